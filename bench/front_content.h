// SPDX-License-Identifier: Apache-2.0
/* What front.c's guest may expect to read: for each position of a disk what it was told is there.

   A write fills each sector with one word, over and over: the sector's number and the write's generation. So a sector of another place, of
   another time, or of two times is seen. A trim may leave what was there or make zeros of it. */

#ifndef FRONT_CONTENT_H
#define FRONT_CONTENT_H

#include "front_disk.h"

enum { UNKNOWN, ZEROS, FIRST_GENERATION };              /* of a position; else the generation of its last write */
static const uint32_t MAYBE_ZEROS = 1u << 31;           /* it was trimmed since */
enum { WORDS = SECTOR_BYTES / 8 };

static uint8_t *whole;      /* one request's bytes, in the order of the disk */

static void make_content(struct disk *disk, const struct options *options) {
    disk->content = zeroed(disk->positions, sizeof *disk->content), disk->is_busy = zeroed(disk->positions, 1);
    disk->generation = FIRST_GENERATION;
    if (!whole) whole = zeroed(1, options->request_bytes);
    FILE *file = options->state_path ? fopen(options->state_path, "rb") : NULL;
    if (!file) return;
    if (fread(disk->content, sizeof *disk->content, disk->positions, file) != disk->positions) die(options->state_path);
    fclose(file);
    for (uint64_t at = 0; at < disk->positions; at++) {
        uint32_t generation = disk->content[at] & ~MAYBE_ZEROS;
        if (generation >= disk->generation) disk->generation = generation + 1;
    }
}

static void save_content(const struct disk *disk, const struct options *options) {
    FILE *file = fopen(options->state_path, "wb");
    if (!file || fwrite(disk->content, sizeof *disk->content, disk->positions, file) != disk->positions || fclose(file)) die(options->state_path);
}

static uint64_t word_of(uint64_t sector, uint32_t generation) {
    return sector << 32 | generation;
}

/* Where the pieces of a request's data lie in memory: the last one first, so that none follows the one before it. */
static uint64_t piece_begin(const struct options *options, unsigned number) {
    return options->request_bytes * number / options->segments;
}

static uint8_t *piece(const struct request *request, const struct options *options, unsigned number) {
    return request->data + (options->request_bytes - piece_begin(options, number + 1));
}

static void fill_data(const struct request *request, const struct options *options) {
    uint64_t first = request->position * options->stride_bytes / SECTOR_BYTES, *words = (uint64_t *)whole;
    for (uint64_t word = 0; word < options->request_bytes / 8; word++) words[word] = word_of(first + word / WORDS, request->generation);
    for (unsigned at = 0; at < options->segments; at++) {
        uint64_t begin = piece_begin(options, at);
        memcpy(piece(request, options, at), whole + begin, piece_begin(options, at + 1) - begin);
    }
}

/* Whether a read has what must be there. */
static int is_as_told(const struct disk *disk, const struct request *request, const struct options *options) {
    uint32_t told = disk->content[request->position], generation = told & ~MAYBE_ZEROS;
    uint64_t first = request->position * options->stride_bytes / SECTOR_BYTES, *words = (uint64_t *)whole, seen_zeros = 0, seen_written = 0;
    for (unsigned at = 0; at < options->segments; at++) {
        uint64_t begin = piece_begin(options, at);
        memcpy(whole + begin, piece(request, options, at), piece_begin(options, at + 1) - begin);
    }
    uint64_t count = options->request_bytes / 8;
    for (uint64_t word = 0; word < count; word++) {
        seen_zeros += words[word] == 0;
        seen_written += generation >= FIRST_GENERATION && words[word] == word_of(first + word / WORDS, generation);
    }
    if (generation == ZEROS) return seen_zeros == count;
    return seen_written == count || (told & MAYBE_ZEROS && seen_zeros + seen_written == count);
}

/* What an answered request leaves there. One that failed may have done all of it, a part, or nothing. */
static void note(struct disk *disk, const struct request *request, int has_failed) {
    uint32_t *there = &disk->content[request->position];
    if (request->kind == READ || request->kind == FLUSH) return;
    if (has_failed) *there = UNKNOWN;
    else if (request->kind == WRITE) *there = request->generation;
    else if (request->kind == ZERO) *there = ZEROS;
    else if (*there != UNKNOWN && *there != ZEROS) *there |= MAYBE_ZEROS;
}

#endif
