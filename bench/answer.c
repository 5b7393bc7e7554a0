// SPDX-License-Identifier: Apache-2.0
/* An NBD server that only answers: answer SOCKET SIZE_BYTES. Nothing is stored; reads show zeros. It exists to measure what a client can do
   at most: no server of this protocol over this socket is faster. One thread for each connection; the newstyle handshake with NBD_OPT_GO. */

#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "wire.h"

#define REPLY_MAGIC 0x3e889045565a9ULL
enum { OPT_ABORT = 2, OPT_INFO = 6, OPT_GO = 7 };
enum { REP_ACK = 1, REP_INFO = 3 };
#define REP_ERR_UNSUP 0x80000001u
#define FLAGS_EXPORT 0x6d   /* has flags, flush, FUA, trim, write zeroes */
enum { REPLIES_MAX = 256, IN_BYTES = 1 << 20, READ_BYTES_MAX = 32 << 20 };

static uint64_t size_bytes;
static uint8_t *zeros;

static int take(int fd, void *into, size_t length) {
    uint8_t *at = into;
    while (length) {
        ssize_t got = recv(fd, at, length, MSG_WAITALL);
        if (got <= 0) return -1;
        at += got, length -= got;
    }
    return 0;
}

static int give(int fd, const void *from, size_t length) {
    const uint8_t *at = from;
    while (length) {
        ssize_t sent = send(fd, at, length, MSG_NOSIGNAL);
        if (sent <= 0) return -1;
        at += sent, length -= sent;
    }
    return 0;
}

static int answer_option(int fd, uint32_t option, uint32_t kind, const void *data, uint32_t length) {
    struct __attribute__((packed)) { uint64_t magic; uint32_t option, kind, length; } header =
        {htobe64(REPLY_MAGIC), htobe32(option), htobe32(kind), htobe32(length)};
    return give(fd, &header, sizeof header) || give(fd, data, length) ? -1 : 0;
}

static int shake_hands(int fd) {
    struct __attribute__((packed)) { uint64_t magic, version; uint16_t flags; } hello =
        {htobe64(NBDMAGIC), htobe64(IHAVEOPT), htobe16(FLAGS_HANDSHAKE)};
    uint32_t client_flags;
    if (give(fd, &hello, sizeof hello) || take(fd, &client_flags, 4)) return -1;
    for (;;) {
        struct __attribute__((packed)) { uint64_t magic; uint32_t option, length; } asked;
        uint8_t data[65536];
        if (take(fd, &asked, sizeof asked) || be64toh(asked.magic) != IHAVEOPT) return -1;
        uint32_t option = be32toh(asked.option), length = be32toh(asked.length);
        if (length > sizeof data || take(fd, data, length)) return -1;
        if (option == OPT_ABORT) {
            answer_option(fd, option, REP_ACK, NULL, 0);
            return -1;
        }
        if (option == OPT_EXPORT_NAME) {
            struct __attribute__((packed)) { uint64_t size; uint16_t flags; uint8_t zeroes[124]; } export =
                {htobe64(size_bytes), htobe16(FLAGS_EXPORT), {0}};
            return give(fd, &export, be32toh(client_flags) & 2 ? 10 : sizeof export);
        }
        if (option == OPT_GO || option == OPT_INFO) {
            struct __attribute__((packed)) { uint16_t info; uint64_t size; uint16_t flags; } export =
                {0, htobe64(size_bytes), htobe16(FLAGS_EXPORT)};
            if (answer_option(fd, option, REP_INFO, &export, sizeof export) || answer_option(fd, option, REP_ACK, NULL, 0)) return -1;
            if (option == OPT_GO) return 0;
        } else if (answer_option(fd, option, REP_ERR_UNSUP, NULL, 0)) {
            return -1;
        }
    }
}

static int send_all(int fd, struct iovec *pieces, int count) {
    while (count) {
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0) return -1;
        while (count && (size_t)sent >= pieces->iov_len) sent -= pieces->iov_len, pieces++, count--;
        if (count) pieces->iov_base = (uint8_t *)pieces->iov_base + sent, pieces->iov_len -= sent;
    }
    return 0;
}

/* What has come is answered with one sendmsg. */
static void answer_requests(int fd) {
    uint8_t *in = malloc(IN_BYTES);
    size_t held = 0;
    uint64_t to_drain = 0;          /* of a written payload that has not come yet */
    uint64_t drained_cookie = 0;    /* whose it is; it is answered when all of it has come */
    struct reply replies[REPLIES_MAX];
    struct iovec pieces[2 * REPLIES_MAX];
    for (;;) {
        ssize_t got = recv(fd, in + held, IN_BYTES - held, 0);
        if (got <= 0) break;
        held += got;
        size_t at = 0;
        int reply_count = 0, piece_count = 0, ended = 0;
        for (;;) {
            uint64_t cookie;
            uint32_t read_bytes = 0;
            if (reply_count == REPLIES_MAX) {
                if (send_all(fd, pieces, piece_count)) goto out;
                reply_count = piece_count = 0;
            }
            if (to_drain) {
                uint64_t piece = held - at < to_drain ? held - at : to_drain;
                at += piece, to_drain -= piece;
                if (to_drain) break;
                cookie = drained_cookie;
            } else {
                struct request asked;
                if (held - at < sizeof asked) break;
                memcpy(&asked, in + at, sizeof asked);
                at += sizeof asked;
                if (be32toh(asked.magic) != REQUEST_MAGIC) goto out;
                uint16_t type = be16toh(asked.type);
                if (type == CMD_DISC) {
                    ended = 1;
                    break;
                }
                cookie = asked.cookie;
                if (type == CMD_READ) {
                    read_bytes = be32toh(asked.length);
                    if (read_bytes > READ_BYTES_MAX) goto out;
                } else if (type == CMD_WRITE && asked.length) {
                    to_drain = be32toh(asked.length);
                    drained_cookie = cookie;
                    continue;
                }
            }
            replies[reply_count] = (struct reply){htobe32(SIMPLE_MAGIC), 0, cookie};
            if (piece_count && (uint8_t *)pieces[piece_count - 1].iov_base + pieces[piece_count - 1].iov_len == (uint8_t *)&replies[reply_count])
                pieces[piece_count - 1].iov_len += sizeof(struct reply);   /* it lies behind the one before */
            else
                pieces[piece_count++] = (struct iovec){&replies[reply_count], sizeof(struct reply)};
            reply_count++;
            if (read_bytes) pieces[piece_count++] = (struct iovec){zeros, read_bytes};
        }
        if (piece_count && send_all(fd, pieces, piece_count)) break;
        if (ended) break;
        held -= at;
        memmove(in, in + at, held);
    }
out:
    free(in);
}

static void *serve(void *argument) {
    int fd = (int)(intptr_t)argument;
    int buffer_bytes = 1 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer_bytes, sizeof buffer_bytes);
    if (!shake_hands(fd)) answer_requests(fd);
    close(fd);
    return NULL;
}

int main(int count, char **words) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (count != 3 || strlen(words[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: answer SOCKET SIZE_BYTES\n");
        return 2;
    }
    strcpy(address.sun_path, words[1]);
    size_bytes = strtoull(words[2], NULL, 10);
    zeros = calloc(1, READ_BYTES_MAX);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (!zeros || listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) {
        perror(words[1]);
        return 1;
    }
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        pthread_t thread;
        if (fd < 0) continue;
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd)) close(fd);
        else pthread_detach(thread);
    }
}
