// SPDX-License-Identifier: Apache-2.0
/* Writes at given offsets over NBD, in the order given, with flushes at exact places, and tells how long each took:

     trace SOCKET OFFSETS DEPTH BLOCK_BYTES FLUSH_EVERY SECONDS FINAL_FLUSH TIMES

   OFFSETS: a file of 64-bit numbers. DEPTH requests are in flight, flushes among them. FLUSH_EVERY: a flush after every so many writes; 0:
   none. SECONDS: when to stop before the offsets end; 0: not. What is in flight in the end is waited for; FINAL_FLUSH: then all is flushed.
   TIMES: a file that is written, one record of two 64-bit numbers for each request: nanoseconds, and whether it was a flush.
   Prints: seconds, and the client's CPU seconds.

   fio can do neither: with a trace it leaves what is in flight in the end, and its times of flushes leave out the sending. */

#include <errno.h>
#include <libnbd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

struct request {
    uint64_t began_ns;
    int is_flush;
    struct request *next;
    uint8_t *buffer;
};
struct seen { uint64_t took_ns, is_flush; };

static struct request *idle;
static struct seen *seen;
static size_t seen_count;
static int failed_errno;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static int ended(void *user_data, int *error) {
    struct request *request = user_data;
    if (*error) failed_errno = *error;
    seen[seen_count++] = (struct seen){now_ns() - request->began_ns, request->is_flush};
    request->next = idle;
    idle = request;
    return 1;   /* libnbd may forget it */
}

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, nbd_get_error() ? nbd_get_error() : strerror(errno));
    exit(1);
}

static uint64_t *read_offsets(const char *path, size_t *count) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) die(path);
    *count = ftell(file) / sizeof(uint64_t);
    rewind(file);
    uint64_t *offsets = malloc((*count + 1) * sizeof *offsets);
    if (!offsets || fread(offsets, sizeof *offsets, *count, file) != *count) die(path);
    fclose(file);
    return offsets;
}

static double cpu_seconds(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void begin(struct nbd_handle *nbd, const uint64_t *offset, size_t block_bytes) {
    struct request *request = idle;
    idle = request->next;
    request->is_flush = offset == NULL;
    request->began_ns = now_ns();
    nbd_completion_callback callback = {.callback = ended, .user_data = request};
    int64_t cookie = offset ? nbd_aio_pwrite(nbd, request->buffer, block_bytes, *offset, callback, 0) : nbd_aio_flush(nbd, callback, 0);
    if (cookie < 0) die("sending");
}

static void wait_for_some(struct nbd_handle *nbd) {
    if (nbd_poll(nbd, -1) < 0) die("waiting");
    if (failed_errno) {
        fprintf(stderr, "a request has failed: %s\n", strerror(failed_errno));
        exit(1);
    }
}

int main(int count, char **words) {
    if (count != 9) {
        fprintf(stderr, "usage: trace SOCKET OFFSETS DEPTH BLOCK_BYTES FLUSH_EVERY SECONDS FINAL_FLUSH TIMES\n");
        return 2;
    }
    size_t offset_count, depth = strtoul(words[3], NULL, 10), block_bytes = strtoul(words[4], NULL, 10);
    size_t flush_every = strtoul(words[5], NULL, 10);
    double most_seconds = strtod(words[6], NULL);
    uint64_t *offsets = read_offsets(words[2], &offset_count);
    seen = malloc((2 * offset_count + 2) * sizeof *seen);
    struct request *requests = calloc(depth, sizeof *requests);
    if (!seen || !requests) die("memory");
    for (size_t i = 0; i < depth; i++) {
        requests[i].buffer = aligned_alloc(4096, (block_bytes + 4095) / 4096 * 4096);
        if (!requests[i].buffer) die("memory");
        for (size_t byte = 0; byte < block_bytes; byte++) requests[i].buffer[byte] = 1 + (byte * 7 + i) % 255;   /* no zeros */
        requests[i].next = idle;
        idle = &requests[i];
    }
    struct nbd_handle *nbd = nbd_create();
    if (!nbd || nbd_connect_unix(nbd, words[1]) < 0) die("connecting");

    uint64_t began_ns = now_ns(), end_ns = most_seconds > 0 ? began_ns + (uint64_t)(most_seconds * 1e9) : UINT64_MAX;
    double cpu_before = cpu_seconds();
    size_t written = 0;
    int flush_is_due = 0;
    while (flush_is_due || (written < offset_count && now_ns() < end_ns)) {
        while (idle && (flush_is_due || written < offset_count)) {
            begin(nbd, flush_is_due ? NULL : &offsets[written], block_bytes);
            if (flush_is_due) flush_is_due = 0;
            else flush_is_due = ++written && flush_every && written % flush_every == 0;
        }
        wait_for_some(nbd);
    }
    while (nbd_aio_in_flight(nbd) > 0) wait_for_some(nbd);
    if (strtoul(words[7], NULL, 10)) {
        begin(nbd, NULL, 0);
        while (nbd_aio_in_flight(nbd) > 0) wait_for_some(nbd);
    }
    printf("%.9f %.9f\n", (now_ns() - began_ns) / 1e9, cpu_seconds() - cpu_before);
    nbd_shutdown(nbd, 0);
    FILE *file = fopen(words[8], "wb");
    if (!file || fwrite(seen, sizeof *seen, seen_count, file) != seen_count || fclose(file)) die(words[8]);
    return 0;
}
