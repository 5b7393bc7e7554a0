// SPDX-License-Identifier: Apache-2.0
/* Load inside a virtual machine: what an application there sees of its disk while the server dies, or the machine moves.

     steady_io DEVICE THREADS BLOCKS SEED STOP

   Each thread has BLOCKS blocks of 4 KiB of its own and a processor of its own as far as there are enough. It writes and reads them at
   random, past the page cache, and knows what each must hold: its number and a stamp. When the file STOP is there they all end, read every
   block once more, and one line is printed: operations, those that failed, blocks that did not hold what they must, and the longest time
   that one operation took. Static: the machine has no C library. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8, THREADS_MAX = 64, FLUSH_EVERY = 64 };

struct worker {
    pthread_t thread;
    uint64_t number, operations, errors, bad, longest_ns, rng;
    uint32_t *stamps;
    uint64_t *buffer;
};

static const char *device, *stop;
static uint64_t blocks;
static struct worker workers[THREADS_MAX];

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static uint64_t draw(struct worker *w, uint64_t below) {
    w->rng ^= w->rng << 13, w->rng ^= w->rng >> 7, w->rng ^= w->rng << 17;
    return (w->rng * 0x2545F4914F6CDD1Dull >> 11) % below;
}

static void note(struct worker *w, const char *what, int failed, uint64_t began_ns) {
    uint64_t took_ns = now_ns() - began_ns;
    if (took_ns > w->longest_ns) w->longest_ns = took_ns;
    w->operations++;
    if (!failed) return;
    w->errors++;
    fprintf(stderr, "steady_io: %s: %s\n", what, strerror(errno));
}

static void write_block(struct worker *w, int fd, uint64_t block, uint32_t stamp) {
    uint64_t place = w->number * blocks + block, began_ns;
    for (int word = 0; word < WORDS; word++) w->buffer[word] = place << 32 | stamp;
    began_ns = now_ns();
    note(w, "write", pwrite(fd, w->buffer, BLOCK, (off_t)(place * BLOCK)) != BLOCK, began_ns);
    w->stamps[block] = stamp;
}

static void read_block(struct worker *w, int fd, uint64_t block) {
    uint64_t place = w->number * blocks + block, began_ns = now_ns();
    int good = 1;
    note(w, "read", pread(fd, w->buffer, BLOCK, (off_t)(place * BLOCK)) != BLOCK, began_ns);
    if (!w->stamps[block]) return;      /* never written: anything may be there */
    for (int word = 0; word < WORDS; word++) good = good && w->buffer[word] == (place << 32 | w->stamps[block]);
    if (good) return;
    w->bad++;
    fprintf(stderr, "steady_io: block %lu begins with %016lx, and its stamp is %08x\n", place, w->buffer[0], w->stamps[block]);
}

static void *work(void *argument) {
    struct worker *w = argument;
    int fd = open(device, O_RDWR | O_DIRECT);
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    cpu_set_t mine;
    CPU_ZERO(&mine);
    CPU_SET(w->number % (uint64_t)processors, &mine);
    sched_setaffinity(0, sizeof mine, &mine);
    if (fd < 0) perror(device), exit(1);
    for (uint32_t stamp = 1; access(stop, F_OK); stamp++) {
        uint64_t block = draw(w, blocks);
        if (stamp % FLUSH_EVERY == 0) {
            uint64_t began_ns = now_ns();
            note(w, "flush", fdatasync(fd), began_ns);
        } else if (draw(w, 3)) {
            write_block(w, fd, block, stamp);
        } else {
            read_block(w, fd, block);
        }
    }
    for (uint64_t block = 0; block < blocks; block++) read_block(w, fd, block);
    close(fd);
    return NULL;
}

int main(int argc, char **words) {
    if (argc != 6) return 2;
    uint64_t threads = strtoull(words[2], NULL, 10), seed = strtoull(words[4], NULL, 10);
    uint64_t operations = 0, errors = 0, bad = 0, longest_ns = 0;
    device = words[1], blocks = strtoull(words[3], NULL, 10), stop = words[5];
    if (threads > THREADS_MAX) return 2;
    for (uint64_t number = 0; number < threads; number++) {
        struct worker *w = &workers[number];
        w->number = number, w->rng = (seed + number) * 0x9E3779B97F4A7C15ull | 1;
        w->stamps = calloc(blocks, sizeof *w->stamps);
        if (!w->stamps || posix_memalign((void **)&w->buffer, BLOCK, BLOCK)) return 1;
        if (pthread_create(&w->thread, NULL, work, w)) return 1;
    }
    for (uint64_t number = 0; number < threads; number++) {
        struct worker *w = &workers[number];
        pthread_join(w->thread, NULL);
        operations += w->operations, errors += w->errors, bad += w->bad;
        if (w->longest_ns > longest_ns) longest_ns = w->longest_ns;
    }
    printf("%lu operations, %lu errors, %lu bad, longest %lu ms\n", operations, errors, bad, longest_ns / 1000000);
    return 0;
}
