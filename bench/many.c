/* A client of many NBD connections in one thread, until SIGTERM:

     many SOCKET randread|randwrite SIZE_BYTES DEPTH EXPORT...

   On each connection DEPTH requests of 4 KiB at random places below SIZE_BYTES are always under way. One thread waits for all of them, so
   what waking a client's threads costs a server is the same however many connections there are; and it is not written in Python, so that
   the server is what is asked to the full. It speaks NBD itself: simple replies, nothing optional. */

#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define NBDMAGIC 0x4e42444d41474943ULL
#define IHAVEOPT 0x49484156454F5054ULL
#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
enum { OPT_EXPORT_NAME = 1, FLAGS_FIXED_NO_ZEROES = 3, CMD_READ = 0, CMD_WRITE = 1 };
enum { BLOCK_BYTES = 4096, RECEIVE_BYTES = 256 << 10, MOST_EVENTS = 256 };

struct __attribute__((packed)) request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
};
struct __attribute__((packed)) reply {
    uint32_t magic, error;
    uint64_t cookie;
};
struct connection {
    int fd, wants_write;
    size_t in_bytes, out_begin, out_end;
    uint8_t *in, *out;
};

static int poll_fd, is_write;
static uint64_t blocks, dice = 0x9E3779B97F4A7C15ULL;
static uint8_t data[BLOCK_BYTES];

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, errno ? strerror(errno) : "the server hung up");
    exit(1);
}

static uint64_t draw(void) {
    dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
    return dice;
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
    ask.flags = htobe32(FLAGS_FIXED_NO_ZEROES), ask.option_magic = htobe64(IHAVEOPT);
    ask.option = htobe32(OPT_EXPORT_NAME), ask.length = htobe32(strlen(export));
    give(fd, &ask, sizeof ask);
    give(fd, export, strlen(export));
    take(fd, &answer, sizeof answer);
    if (be64toh(answer.size) < size_bytes) errno = ERANGE, die(export);
    return fd;
}

/* COUNT more requests, as far as the socket takes them. */
static void ask(struct connection *one, size_t count) {
    if (one->out_begin == one->out_end) one->out_begin = one->out_end = 0;
    else if (one->out_begin) {
        memmove(one->out, one->out + one->out_begin, one->out_end - one->out_begin);
        one->out_end -= one->out_begin, one->out_begin = 0;
    }
    for (; count; count--) {
        struct request request = {.magic = htobe32(REQUEST_MAGIC), .type = htobe16(is_write ? CMD_WRITE : CMD_READ)};
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

/* How many requests what has arrived answers. */
static size_t answered(struct connection *one) {
    size_t size = sizeof(struct reply) + (is_write ? 0 : BLOCK_BYTES), done;
    errno = 0;
    ssize_t got = recv(one->fd, one->in + one->in_bytes, RECEIVE_BYTES - one->in_bytes, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return 0;
    if (got <= 0) die("receive");
    one->in_bytes += got;
    done = one->in_bytes / size;
    for (size_t at = 0; at < done; at++) {
        struct reply reply;
        memcpy(&reply, one->in + at * size, sizeof reply);
        if (be32toh(reply.magic) != SIMPLE_MAGIC || reply.error) errno = EIO, die("reply");
    }
    one->in_bytes -= done * size;
    memmove(one->in, one->in + done * size, one->in_bytes);
    return done;
}

int main(int argc, char **argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: many SOCKET randread|randwrite SIZE_BYTES DEPTH EXPORT...\n");
        return 2;
    }
    size_t count = argc - 5, depth = strtoul(argv[4], NULL, 10);
    uint64_t size_bytes = strtoull(argv[3], NULL, 10);
    struct connection *all = calloc(count, sizeof *all);
    is_write = !strcmp(argv[2], "randwrite");
    blocks = size_bytes / BLOCK_BYTES;
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (!all || !depth || !blocks || poll_fd < 0) die("start");
    for (size_t at = 0; at < BLOCK_BYTES; at += 8) {
        uint64_t word = draw();
        memcpy(data + at, &word, 8);
    }
    for (size_t at = 0; at < count; at++) {
        struct connection *one = &all[at];
        one->fd = connected(argv[1], argv[5 + at], size_bytes);
        one->in = malloc(RECEIVE_BYTES), one->out = malloc(depth * (sizeof(struct request) + BLOCK_BYTES));
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = one};
        if (!one->in || !one->out || epoll_ctl(poll_fd, EPOLL_CTL_ADD, one->fd, &event)) die("start");
    }
    for (size_t at = 0; at < count; at++) ask(&all[at], depth);
    for (;;) {
        struct epoll_event events[MOST_EVENTS];
        int ready = epoll_wait(poll_fd, events, MOST_EVENTS, -1);
        if (ready < 0 && errno != EINTR) die("epoll_wait");
        for (int at = 0; at < ready; at++) {
            struct connection *one = events[at].data.ptr;
            ask(one, events[at].events & ~EPOLLOUT ? answered(one) : 0);
        }
    }
}
