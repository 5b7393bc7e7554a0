// SPDX-License-Identifier: Apache-2.0
/* A client of many NBD connections, or of one, in one thread:

     many SOCKET randread|randwrite SIZE_BYTES DEPTH SECONDS TIMES EXPORT...

   On each connection DEPTH requests of 4 KiB at random places below SIZE_BYTES are always under way. SECONDS: when to stop; 0: at SIGTERM,
   and nothing is told. Otherwise TIMES, a file, gets one 64-bit number for each request, nanoseconds, in the order of their ends; and it
   prints seconds, and its own CPU seconds. It speaks NBD itself: simple replies, nothing optional.

   It exists because it costs little: fio's client takes more of two processors than the servers that it asks, a client in Python more than
   that. One thread waits for all connections, so what waking a client's threads costs a server is the same however many there are. */

#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

enum { BLOCK_BYTES = 4096, RECEIVE_BYTES = 256 << 10, EVENTS_MAX = 256, PER_SECOND_MAX = 2000000 };

struct connection {
    int fd, wants_write;
    size_t in_bytes, out_begin, out_end, idle_count;
    uint8_t *in, *out;
    uint64_t *began_ns, *idle;      /* by cookie; and the cookies of no request */
};

static int poll_fd, is_write;
static uint64_t blocks, rng = 0x9E3779B97F4A7C15ULL;
static uint8_t data[BLOCK_BYTES];
static uint64_t *took_ns;
static size_t took_count, took_capacity;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, errno ? strerror(errno) : "the server hung up");
    exit(1);
}

static uint64_t draw(void) {
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    return rng;
}

static void take(int fd, void *into, size_t length) {
    errno = 0;
    if (recv(fd, into, length, MSG_WAITALL) != (ssize_t)length) die("handshake");
}

static void give(int fd, const void *from, size_t length) {
    if (send(fd, from, length, MSG_NOSIGNAL) != (ssize_t)length) die("handshake");
}

static int connected(const char *path, const char *export, uint64_t size_bytes) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct __attribute__((packed)) { uint64_t magic, option_magic; uint16_t flags; } hello;
    struct __attribute__((packed)) { uint32_t flags; uint64_t option_magic; uint32_t option, length; } ask;
    struct __attribute__((packed)) { uint64_t size; uint16_t flags; } answer;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) die(path);
    take(fd, &hello, sizeof hello);
    if (be64toh(hello.magic) != NBDMAGIC || be64toh(hello.option_magic) != IHAVEOPT) errno = EPROTO, die(path);
    ask.flags = htobe32(FLAGS_HANDSHAKE), ask.option_magic = htobe64(IHAVEOPT);
    ask.option = htobe32(OPT_EXPORT_NAME), ask.length = htobe32(strlen(export));
    give(fd, &ask, sizeof ask);
    give(fd, export, strlen(export));
    take(fd, &answer, sizeof answer);
    if (be64toh(answer.size) < size_bytes) errno = ERANGE, die(export);
    return fd;
}

/* A request for each idle cookie, as far as the socket takes them. */
static void ask(struct connection *one) {
    uint64_t now = now_ns();
    if (one->out_begin == one->out_end) one->out_begin = one->out_end = 0;
    else if (one->out_begin) {
        memmove(one->out, one->out + one->out_begin, one->out_end - one->out_begin);
        one->out_end -= one->out_begin, one->out_begin = 0;
    }
    while (one->idle_count) {
        uint64_t cookie = one->idle[--one->idle_count];
        one->began_ns[cookie] = now;
        struct request request = {.cookie = htobe64(cookie), .magic = htobe32(REQUEST_MAGIC), .type = htobe16(is_write ? CMD_WRITE : CMD_READ)};
        request.offset = htobe64(draw() % blocks * BLOCK_BYTES), request.length = htobe32(BLOCK_BYTES);
        memcpy(one->out + one->out_end, &request, sizeof request);
        one->out_end += sizeof request;
        if (is_write) memcpy(one->out + one->out_end, data, BLOCK_BYTES), one->out_end += BLOCK_BYTES;
    }
    if (one->out_begin < one->out_end) {
        ssize_t sent = send(one->fd, one->out + one->out_begin, one->out_end - one->out_begin, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) die("send");
        if (sent > 0) one->out_begin += sent;
    }
    if (one->wants_write != (one->out_begin < one->out_end)) {
        one->wants_write = !one->wants_write;
        struct epoll_event event = {.events = EPOLLIN | (one->wants_write ? EPOLLOUT : 0), .data.ptr = one};
        if (epoll_ctl(poll_fd, EPOLL_CTL_MOD, one->fd, &event)) die("epoll_ctl");
    }
}

/* Takes what has arrived. */
static void receive(struct connection *one, size_t depth) {
    size_t size = sizeof(struct reply) + (is_write ? 0 : BLOCK_BYTES), done;
    errno = 0;
    ssize_t got = recv(one->fd, one->in + one->in_bytes, RECEIVE_BYTES - one->in_bytes, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) die("receive");
    uint64_t now = now_ns();
    one->in_bytes += got;
    done = one->in_bytes / size;
    for (size_t at = 0; at < done; at++) {
        struct reply reply;
        memcpy(&reply, one->in + at * size, sizeof reply);
        uint64_t cookie = be64toh(reply.cookie);
        if (be32toh(reply.magic) != SIMPLE_MAGIC || reply.error || cookie >= depth) errno = EIO, die("reply");
        if (took_count < took_capacity) took_ns[took_count++] = now - one->began_ns[cookie];
        one->idle[one->idle_count++] = cookie;
    }
    one->in_bytes -= done * size;
    memmove(one->in, one->in + done * size, one->in_bytes);
}

static double cpu_seconds(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

int main(int argc, char **argv) {
    if (argc < 8) {
        fprintf(stderr, "usage: many SOCKET randread|randwrite SIZE_BYTES DEPTH SECONDS TIMES EXPORT...\n");
        return 2;
    }
    size_t count = argc - 7, depth = strtoul(argv[4], NULL, 10);
    uint64_t size_bytes = strtoull(argv[3], NULL, 10);
    double seconds = atof(argv[5]);
    struct connection *all = calloc(count, sizeof *all);
    is_write = !strcmp(argv[2], "randwrite");
    blocks = size_bytes / BLOCK_BYTES;
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    took_capacity = seconds * PER_SECOND_MAX;
    took_ns = calloc(took_capacity + 1, sizeof *took_ns);
    if (!all || !depth || !blocks || poll_fd < 0 || !took_ns) die("start");
    for (size_t at = 0; at < BLOCK_BYTES; at += 8) {
        uint64_t word = draw();
        memcpy(data + at, &word, 8);
    }
    for (size_t at = 0; at < count; at++) {
        struct connection *one = &all[at];
        one->fd = connected(argv[1], argv[7 + at], size_bytes);
        one->in = malloc(RECEIVE_BYTES), one->out = malloc(depth * (sizeof(struct request) + BLOCK_BYTES));
        one->began_ns = calloc(depth, sizeof(uint64_t)), one->idle = calloc(depth, sizeof(uint64_t));
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = one};
        if (!one->in || !one->out || !one->began_ns || !one->idle || epoll_ctl(poll_fd, EPOLL_CTL_ADD, one->fd, &event)) die("start");
        for (one->idle_count = 0; one->idle_count < depth; one->idle_count++) one->idle[one->idle_count] = one->idle_count;
    }
    double cpu = cpu_seconds();
    uint64_t began = now_ns(), end = seconds > 0 ? began + (uint64_t)(seconds * 1e9) : UINT64_MAX, now;
    for (size_t at = 0; at < count; at++) ask(&all[at]);
    while ((now = now_ns()) < end) {
        struct epoll_event events[EVENTS_MAX];
        int ready = epoll_wait(poll_fd, events, EVENTS_MAX, seconds > 0 ? 100 : -1);
        if (ready < 0 && errno != EINTR) die("epoll_wait");
        for (int at = 0; at < ready; at++) {
            struct connection *one = events[at].data.ptr;
            if (events[at].events & ~EPOLLOUT) receive(one, depth);
            ask(one);
        }
    }
    FILE *times = fopen(argv[6], "wb");
    if (!times || fwrite(took_ns, sizeof *took_ns, took_count, times) != took_count || fclose(times)) die(argv[6]);
    printf("%.9f %.6f\n", (now - began) / 1e9, cpu_seconds() - cpu);
    return 0;
}
