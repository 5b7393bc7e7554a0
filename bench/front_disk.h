// SPDX-License-Identifier: Apache-2.0
/* A disk as front.c's guest has it: memory that is shared with the server, rings in it, requests, and the handshake that hands them over.
   Knows nothing of what is asked, and when. */

#ifndef FRONT_DISK_H
#define FRONT_DISK_H

#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/un.h>
#include <unistd.h>

#include "vhost.h"

enum { SECTOR_BYTES = 512, PAGE = 4096, QUEUES_MAX = 64 };
static const uint64_t GUEST_ADDRESS = 1ull << 30;   /* where the guest sees its memory: not where we do */
static const uint64_t VERSION_1 = 1ull << 32;

enum kind { READ, WRITE, ZERO, TRIM, FLUSH, KINDS };

struct options {
    unsigned queues, depth, ring_size, segments, flush_every;   /* depth: of each queue */
    unsigned weights[KINDS];
    uint64_t request_bytes, stride_bytes, range_bytes, shift_bytes, count, seed;
    int indirect, event_index, inflight, mem_slots, sequential, once, last_flush, wait, verify, reconnect;
    double seconds, patience_seconds;
    const char *state_path;
};

struct request {
    enum kind kind;
    int under_way;
    uint16_t head;              /* its first descriptor in the ring */
    uint32_t generation;        /* of what it writes */
    uint64_t position, began_ns;
    struct virtio_blk_outhdr *header;   /* from here on in the guest's memory */
    struct virtio_blk_discard_write_zeroes *range;
    uint8_t *status, *data;
    struct vring_desc *table;
};
struct disk;
struct queue {
    struct disk *disk;
    unsigned index, idle_count, writes_since_flush;
    int kick_fd, call_fd, is_ready;
    struct vring ring;
    uint16_t taken, kicked;     /* of the used ring; what the server knows of the available one */
    struct request *requests, **idle;
};
struct disk {
    const char *path;
    int channel, memory_fd, inflight_fd;
    uint64_t features, protocol, capacity_bytes;
    uint8_t *memory;
    uint64_t memory_bytes, carved_bytes;
    struct message inflight;    /* what the area in `inflight_fd` is like */
    struct queue *queues;
    uint64_t positions, next, draws;    /* of requests: places, and what a sequence comes to next */
    uint32_t *order;            /* of `once` */
    uint32_t *content, generation;      /* front_content.h */
    uint8_t *is_busy;
};

static void die(const char *what) {
    fprintf(stderr, "front: %s: %s\n", what, errno ? strerror(errno) : "not as it must be");
    exit(1);
}

static void *zeroed(size_t count, size_t size) {
    void *found = calloc(count ? count : 1, size);
    if (!found) die("memory");
    return found;
}

/* --- Memory --------------------------------------------------------------------------------------------------------------------- */

static void *carve(struct disk *disk, uint64_t bytes, uint64_t alignment) {
    uint64_t begin = (disk->carved_bytes + alignment - 1) / alignment * alignment;
    disk->carved_bytes = begin + bytes;
    return disk->memory ? disk->memory + begin : NULL;
}

static uint64_t guest_address(const struct disk *disk, const void *in_memory) {
    return GUEST_ADDRESS + ((const uint8_t *)in_memory - disk->memory);
}

/* Where everything of a queue lies. Before there is memory this only counts what is needed. */
static void lay_out(struct disk *disk, struct queue *queue, const struct options *options) {
    uint8_t *ring = carve(disk, vring_size(options->ring_size, PAGE), PAGE);
    if (ring) vring_init(&queue->ring, options->ring_size, ring, PAGE);
    for (unsigned at = 0; at < options->depth; at++) {
        struct request *request = &queue->requests[at];
        request->header = carve(disk, sizeof *request->header, 16);
        request->range = carve(disk, sizeof *request->range, 16);
        request->status = carve(disk, 1, 16);
        request->table = carve(disk, (options->segments + 2) * sizeof *request->table, 16);
        request->head = at * (options->indirect ? 1 : options->segments + 2);
    }
    for (unsigned at = 0; at < options->depth; at++)
        queue->requests[at].data = carve(disk, options->request_bytes + PAGE, PAGE) + options->shift_bytes % PAGE;
}

static void make_disk(struct disk *disk, const char *path, const struct options *options) {
    disk->path = path, disk->channel = disk->inflight_fd = -1;
    disk->queues = zeroed(options->queues, sizeof *disk->queues);
    for (unsigned at = 0; at < options->queues; at++) {
        struct queue *queue = &disk->queues[at];
        queue->disk = disk, queue->index = at;
        queue->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), queue->call_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        if (queue->kick_fd < 0 || queue->call_fd < 0) die("eventfd");
        queue->requests = zeroed(options->depth, sizeof *queue->requests);
        queue->idle = zeroed(options->depth, sizeof *queue->idle);
        while (queue->idle_count < options->depth) {
            queue->idle[queue->idle_count] = &queue->requests[queue->idle_count];
            queue->idle_count++;
        }
        lay_out(disk, queue, options);
    }
    disk->memory_bytes = (disk->carved_bytes + PAGE - 1) / PAGE * PAGE, disk->carved_bytes = 0;
    disk->memory_fd = memfd_create("guest", MFD_CLOEXEC);
    if (disk->memory_fd < 0 || ftruncate(disk->memory_fd, disk->memory_bytes)) die("memfd");
    disk->memory = mmap(NULL, disk->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, disk->memory_fd, 0);
    if (disk->memory == MAP_FAILED) die("mmap");
    for (unsigned at = 0; at < options->queues; at++) lay_out(disk, &disk->queues[at], options);
}

/* --- The handshake: each step is 0, or -1 when the server has gone or refuses ------------------------------------------------------ */

static int tell(struct disk *disk, struct message *message, uint32_t request, uint32_t size, int fd) {
    int wants_answer = !!(disk->protocol & PROTOCOL_REPLY_ACK), none[REGIONS_MAX];
    if (send_message(disk->channel, message, request, wants_answer ? NEEDS_REPLY : 0, size, fd)) return -1;
    if (!wants_answer) return 0;
    if (receive_message(disk->channel, message, none) < 0) return -1;
    if (message->number) fprintf(stderr, "front: the server refuses message %u: %lu\n", request, message->number);
    return message->number ? -1 : 0;
}

static int tell_number(struct disk *disk, uint32_t request, uint64_t number, int fd) {
    struct message message = {.number = number};
    return tell(disk, &message, request, sizeof number, fd);
}

static int tell_ring(struct disk *disk, uint32_t request, unsigned index, uint32_t value) {
    struct message message = {.ring = {index, value}};
    return tell(disk, &message, request, sizeof message.ring, -1);
}

/* `fd`: what came with the answer, or NULL. */
static int ask(struct disk *disk, struct message *message, uint32_t request, uint32_t size, int *fd) {
    int fds[REGIONS_MAX];
    if (send_message(disk->channel, message, request, 0, size, -1)) return -1;
    int count = receive_message(disk->channel, message, fds);
    if (count < 0 || message->request != request || !(message->flags & IS_REPLY) || (fd && count != 1)) return -1;
    if (fd) *fd = fds[0];
    return 0;
}

static int hand_over_inflight(struct disk *disk, const struct options *options) {
    struct message message = {.inflight = {.queues = options->queues, .ring_size = options->ring_size}};
    if (!(disk->protocol & PROTOCOL_INFLIGHT)) return 0;
    if (disk->inflight_fd < 0) {
        if (ask(disk, &message, GET_INFLIGHT_FD, sizeof message.inflight, &disk->inflight_fd)) return -1;
        disk->inflight = message;
    }
    message = disk->inflight;
    message.inflight.queues = options->queues, message.inflight.ring_size = options->ring_size;
    return tell(disk, &message, SET_INFLIGHT_FD, sizeof message.inflight, disk->inflight_fd);
}

static int hand_over_memory(struct disk *disk) {
    struct region region = {GUEST_ADDRESS, disk->memory_bytes, (uintptr_t)disk->memory, 0};
    struct message message;
    if (disk->protocol & PROTOCOL_MEM_SLOTS) {
        message.slot.padding = 0, message.slot.region = region;
        return tell(disk, &message, ADD_MEM_REG, sizeof message.slot, disk->memory_fd);
    }
    message.memory.count = 1, message.memory.padding = 0, message.memory.regions[0] = region;
    return tell(disk, &message, SET_MEM_TABLE, 8 + sizeof region, disk->memory_fd);
}

/* It goes on where its used ring ends: what is available behind that has had no answer. */
static int hand_over_ring(struct queue *queue) {
    struct disk *disk = queue->disk;
    struct message message = {.rings = {.index = queue->index}};
    uint16_t base = __atomic_load_n(&queue->ring.used->idx, __ATOMIC_ACQUIRE);
    message.rings.descriptors = (uintptr_t)queue->ring.desc, message.rings.available = (uintptr_t)queue->ring.avail;
    message.rings.used = (uintptr_t)queue->ring.used;
    if (tell_ring(disk, SET_VRING_NUM, queue->index, queue->ring.num) || tell_ring(disk, SET_VRING_BASE, queue->index, base)) return -1;
    if (tell(disk, &message, SET_VRING_ADDR, sizeof message.rings, -1)) return -1;
    if (tell_number(disk, SET_VRING_KICK, queue->index, queue->kick_fd)) return -1;
    return tell_number(disk, SET_VRING_CALL, queue->index, queue->call_fd) || tell_ring(disk, SET_VRING_ENABLE, queue->index, 1) ? -1 : 0;
}

static int agree(struct disk *disk, const struct options *options) {
    uint64_t wanted = VERSION_1 | HAS_PROTOCOL_FEATURES | 1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_DISCARD;
    wanted |= 1ull << VIRTIO_BLK_F_WRITE_ZEROES | 1ull << VIRTIO_BLK_F_BLK_SIZE | 1ull << VIRTIO_BLK_F_SEG_MAX;
    if (options->queues > 1) wanted |= 1ull << VIRTIO_BLK_F_MQ;
    if (options->indirect) wanted |= 1ull << VIRTIO_RING_F_INDIRECT_DESC;
    if (options->event_index) wanted |= 1ull << VIRTIO_RING_F_EVENT_IDX;
    uint64_t wanted_protocol = PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG;
    if (options->inflight) wanted_protocol |= PROTOCOL_INFLIGHT;
    if (options->mem_slots) wanted_protocol |= PROTOCOL_MEM_SLOTS;
    struct message message;
    disk->protocol = 0;
    if (ask(disk, &message, GET_FEATURES, 0, NULL)) return -1;
    uint64_t needed = VERSION_1 | HAS_PROTOCOL_FEATURES | (options->indirect ? 1ull << VIRTIO_RING_F_INDIRECT_DESC : 0);
    if (needed & ~message.number) errno = ENOTSUP, die("the server's features");
    disk->features = message.number & wanted;
    if (ask(disk, &message, GET_PROTOCOL_FEATURES, 0, NULL)) return -1;
    uint64_t protocol = message.number & wanted_protocol;
    if (tell_number(disk, SET_PROTOCOL_FEATURES, protocol, -1)) return -1;
    disk->protocol = protocol;
    if (tell(disk, &message, SET_OWNER, 0, -1)) return -1;
    if (protocol & PROTOCOL_MQ) {
        if (ask(disk, &message, GET_QUEUE_NUM, 0, NULL)) return -1;
        if (message.number < options->queues) errno = ERANGE, die("the server has not so many queues");
    }
    message.config.offset = 0, message.config.size = CONFIG_BYTES, message.config.flags = 0;
    memset(message.config.data, 0, CONFIG_BYTES);
    if (ask(disk, &message, GET_CONFIG, CONFIG_HEADER_BYTES + CONFIG_BYTES, NULL)) return -1;
    struct virtio_blk_config config;
    memcpy(&config, message.config.data, CONFIG_BYTES);
    disk->capacity_bytes = config.capacity * SECTOR_BYTES;
    return tell_number(disk, SET_FEATURES, disk->features, -1);
}

static int attach(struct disk *disk, const struct options *options) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (disk->channel >= 0) close(disk->channel);
    disk->channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, disk->path, sizeof address.sun_path - 1);
    if (disk->channel < 0) die("socket");
    if (connect(disk->channel, (struct sockaddr *)&address, sizeof address)) return -1;
    if (agree(disk, options) || hand_over_inflight(disk, options) || hand_over_memory(disk)) return -1;
    for (unsigned at = 0; at < options->queues; at++)
        if (hand_over_ring(&disk->queues[at])) return -1;
    return 0;
}

/* The rings stop, as those of a guest that is shut down. 0 if each has ended where the guest has. */
static int detach(struct disk *disk, const struct options *options) {
    for (unsigned at = 0; at < options->queues; at++) {
        struct message message = {.ring = {at, 0}};
        if (ask(disk, &message, GET_VRING_BASE, sizeof message.ring, NULL)) return -1;
        if ((uint16_t)message.ring.value != disk->queues[at].taken) return -1;
    }
    return close(disk->channel);
}

#endif
