// SPDX-License-Identifier: Apache-2.0
/* What front.c and ring_server.c both say over vhost-user: the messages that a virtio-blk device needs, and how one is sent and received.
   Rings and requests are those of linux/virtio_ring.h and linux/virtio_blk.h. */

#ifndef VHOST_H
#define VHOST_H

#include <linux/virtio_ring.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9, SET_VRING_BASE = 10,
    GET_VRING_BASE = 11, SET_VRING_KICK = 12, SET_VRING_CALL = 13, SET_VRING_ERR = 14, GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17, SET_VRING_ENABLE = 18, GET_CONFIG = 24, GET_INFLIGHT_FD = 31, SET_INFLIGHT_FD = 32, GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
};
enum { PROTOCOL_MQ = 1 << 0, PROTOCOL_REPLY_ACK = 1 << 3, PROTOCOL_CONFIG = 1 << 9, PROTOCOL_INFLIGHT = 1 << 12, PROTOCOL_MEM_SLOTS = 1 << 15 };
enum { VERSION = 1, IS_REPLY = 4, NEEDS_REPLY = 8, HEADER_BYTES = 12, CONFIG_HEADER_BYTES = 12, CONFIG_BYTES = 60, REGIONS_MAX = 8 };
static const uint64_t HAS_PROTOCOL_FEATURES = 1ull << 30;   /* among the features of the device */

struct region {
    uint64_t guest, size, user, offset;     /* address in the guest, and in the front end; where its file holds it */
};
struct __attribute__((packed)) message {
    uint32_t request, flags, size;
    union __attribute__((packed)) {
        uint64_t number;                    /* of a ring's descriptors: its index */
        struct { uint32_t index, value; } ring;
        struct { uint32_t index, flags; uint64_t descriptors, used, available, log; } rings;
        struct { uint32_t count, padding; struct region regions[REGIONS_MAX]; } memory;
        struct { uint64_t padding; struct region region; } slot;
        struct { uint32_t offset, size, flags; uint8_t data[256]; } config;
        struct __attribute__((packed)) { uint64_t size, offset; uint16_t queues, ring_size; } inflight;
    };
};

/* The payload stands in the message. 0, or -1 with errno. */
static inline int send_message(int channel, struct message *message, uint32_t request, uint32_t flags, uint32_t size, int fd) {
    char control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec piece = {message, HEADER_BYTES + size};
    struct msghdr header = {.msg_iov = &piece, .msg_iovlen = 1};
    message->request = request, message->flags = VERSION | flags, message->size = size;
    if (fd >= 0) {
        header.msg_control = control, header.msg_controllen = sizeof control;
        struct cmsghdr *descriptors = CMSG_FIRSTHDR(&header);
        descriptors->cmsg_level = SOL_SOCKET, descriptors->cmsg_type = SCM_RIGHTS, descriptors->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(descriptors), &fd, sizeof fd);
    }
    return sendmsg(channel, &header, MSG_NOSIGNAL) == (ssize_t)piece.iov_len ? 0 : -1;
}

/* How many descriptors came with it, at most REGIONS_MAX; or -1: the other end is gone, or says nothing that fits. */
static inline int receive_message(int channel, struct message *message, int *fds) {
    char control[CMSG_SPACE(REGIONS_MAX * sizeof *fds)];
    struct iovec piece = {message, HEADER_BYTES};
    struct msghdr header = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    int count = 0;
    if (recvmsg(channel, &header, MSG_WAITALL | MSG_CMSG_CLOEXEC) != HEADER_BYTES) return -1;
    struct cmsghdr *descriptors = CMSG_FIRSTHDR(&header);
    if (descriptors && descriptors->cmsg_type == SCM_RIGHTS) {
        count = (descriptors->cmsg_len - CMSG_LEN(0)) / sizeof *fds;
        memcpy(fds, CMSG_DATA(descriptors), count * sizeof *fds);
    }
    if (message->size > sizeof *message - HEADER_BYTES) return -1;
    if (message->size && recv(channel, &message->number, message->size, MSG_WAITALL) != (ssize_t)message->size) return -1;
    return count;
}

/* EVENT_IDX: behind the available ring the driver says which used entry it waits for; behind the used ring the device says the same. */
static inline uint16_t *used_event(const struct vring *ring) {
    return &ring->avail->ring[ring->num];
}

static inline uint16_t *available_event(const struct vring *ring) {
    void *behind = &ring->used->ring[ring->num];
    return behind;
}

#endif
