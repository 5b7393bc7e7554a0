// SPDX-License-Identifier: Apache-2.0
/* The most that can be had: a vhost-user-blk server of a raw device, with nothing between the guest's rings and the device.

     ring_server SOCKET DEVICE QUEUES

   One thread and one io_uring; data move between the guest's memory and the device without a copy, the file and the memory are registered,
   and each request is one operation of the device. No mapping, no limits, no statistics, one front end at a time: it exists to say what a
   server with all that can be held to. A front end that breaks the protocol ends it. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "vhost.h"

enum { ENTRIES = 1024, QUEUES_MAX = 64, RING_MAX = 1024, SECTOR_BYTES = 512, SEGMENTS_MAX = 254, CHAINS_A_TURN = 64 };
enum { READV_FIXED = 60, WRITEV_FIXED = 61 };       /* of Linux 6.15, which this liburing does not know yet */
static const uint64_t VERSION_1 = 1ull << 32, REGISTERED_BYTES_MAX = 1ull << 30;
enum tag { CHAIN, KICK, CHANNEL, NOTHING, TAG_BITS = 3 };    /* in the low bits of a completion's user data */

struct chain {
    struct queue *queue;
    uint16_t head;
    int pending, has_failed;
    uint32_t written_bytes;
    uint8_t *status;
    struct iovec pieces[SEGMENTS_MAX];
};
struct queue {
    struct vring ring;
    int kick_fd, call_fd, is_started, under_way;
    uint16_t taken, used, told;     /* of the available ring; of the used one, and when the driver was last called */
    struct chain *chains;
};
struct mapping {
    struct region region;
    uint8_t *memory;
    void *mapped;
    uint64_t mapped_bytes;
};

static struct io_uring uring;
static int channel = -1, is_registered, has_fixed_vectors;
static unsigned queue_count;
static struct queue queues[QUEUES_MAX];
static struct mapping mappings[REGIONS_MAX];
static unsigned mapping_count;
static uint64_t features, protocol, disk_bytes;

static void die(const char *what) {
    fprintf(stderr, "ring_server: %s: %s\n", what, errno ? strerror(errno) : "not as it must be");
    exit(1);
}

static void refuse(const char *what) {
    errno = 0, die(what);
}

/* --- Memory --------------------------------------------------------------------------------------------------------------------- */

/* Where the guest's `bytes` at an address are here. `number`: of the mapping. */
static void *in_guest(uint64_t address, uint64_t bytes, unsigned *number) {
    for (unsigned at = 0; at < mapping_count; at++) {
        uint64_t offset = address - mappings[at].region.guest;
        if (address < mappings[at].region.guest || offset > mappings[at].region.size || bytes > mappings[at].region.size - offset) continue;
        if (number) *number = at;
        return mappings[at].memory + offset;
    }
    refuse("an address outside of the guest's memory");
    return NULL;
}

static void *of_user(uint64_t address, uint64_t bytes) {
    for (unsigned at = 0; at < mapping_count; at++) {
        uint64_t offset = address - mappings[at].region.user;
        if (address >= mappings[at].region.user && offset <= mappings[at].region.size && bytes <= mappings[at].region.size - offset)
            return mappings[at].memory + offset;
    }
    refuse("a ring outside of the guest's memory");
    return NULL;
}

static void forget_memory(void) {
    if (is_registered) io_uring_unregister_buffers(&uring);
    is_registered = 0;
    while (mapping_count) mapping_count--, munmap(mappings[mapping_count].mapped, mappings[mapping_count].mapped_bytes);
}

static void map_memory(const struct message *message, const int *fds, int fd_count) {
    struct iovec pieces[REGIONS_MAX];
    int fits = 1;
    forget_memory();
    if ((int)message->memory.count != fd_count) refuse("a memory table");
    for (int at = 0; at < fd_count; at++) {
        struct mapping *mapping = &mappings[at];
        mapping->region = message->memory.regions[at];
        mapping->mapped_bytes = mapping->region.offset + mapping->region.size;
        mapping->mapped = mmap(NULL, mapping->mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[at], 0);
        if (mapping->mapped == MAP_FAILED) die("mmap");
        mapping->memory = (uint8_t *)mapping->mapped + mapping->region.offset;
        pieces[at] = (struct iovec){mapping->memory, mapping->region.size};
        fits &= mapping->region.size <= REGISTERED_BYTES_MAX;
        close(fds[at]);
    }
    mapping_count = fd_count;
    is_registered = fits && !io_uring_register_buffers(&uring, pieces, fd_count);
}

/* --- Requests ------------------------------------------------------------------------------------------------------------------- */

static struct io_uring_sqe *entry(void *whose, enum tag tag) {
    struct io_uring_sqe *found = io_uring_get_sqe(&uring);
    if (!found) {
        io_uring_submit(&uring);
        found = io_uring_get_sqe(&uring);
        if (!found) refuse("the queue to the device is full");
    }
    memset(found, 0, sizeof *found);
    io_uring_sqe_set_data64(found, (uintptr_t)whose | tag);
    return found;
}

static void watch(int fd, void *whose, enum tag tag) {
    struct io_uring_sqe *made = entry(whose, tag);
    if (tag == KICK) io_uring_prep_poll_multishot(made, fd, POLLIN);    /* it is never read: each kick wakes anew */
    else io_uring_prep_poll_add(made, fd, POLLIN);
}

static void end_chain(struct chain *chain) {
    struct queue *queue = chain->queue;
    *chain->status = chain->has_failed ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK;
    queue->ring.used->ring[queue->used++ % queue->ring.num] = (struct vring_used_elem){chain->head, chain->written_bytes + 1};
    queue->under_way--;
}

static void submit(struct chain *chain, struct io_uring_sqe *made) {
    made->flags |= IOSQE_FIXED_FILE;
    chain->pending++;
}

/* All of a request is one operation, of one piece or of many; the guest's memory need not be pinned anew if it is registered. */
static void transfer(struct chain *chain, int is_read, uint64_t offset, unsigned count, unsigned mapping, int in_one_mapping) {
    struct io_uring_sqe *made = entry(chain, CHAIN);
    struct iovec *first = chain->pieces;
    int is_fixed = is_registered && in_one_mapping && (count == 1 || has_fixed_vectors);
    if (count == 1 && is_fixed && is_read) io_uring_prep_read_fixed(made, 0, first->iov_base, first->iov_len, offset, mapping);
    else if (count == 1 && is_fixed) io_uring_prep_write_fixed(made, 0, first->iov_base, first->iov_len, offset, mapping);
    else if (is_read) io_uring_prep_readv(made, 0, first, count, offset);
    else io_uring_prep_writev(made, 0, first, count, offset);
    if (count > 1 && is_fixed) made->opcode = is_read ? READV_FIXED : WRITEV_FIXED, made->buf_index = mapping;
    submit(chain, made);
}

static void begin_transfer(struct chain *chain, int is_read, uint64_t offset, const struct vring_desc *pieces, unsigned count) {
    unsigned mapping = 0, found = 0, previous = 0;
    uint64_t bytes = 0;
    int in_one_mapping = 1;
    for (unsigned at = 0; at < count; at++) {
        struct iovec piece = {in_guest(pieces[at].addr, pieces[at].len, &mapping), pieces[at].len};
        bytes += piece.iov_len;
        if (at && mapping != previous) in_one_mapping = 0;
        previous = mapping;
        if (found && (uint8_t *)chain->pieces[found - 1].iov_base + chain->pieces[found - 1].iov_len == piece.iov_base)
            chain->pieces[found - 1].iov_len += piece.iov_len;
        else
            chain->pieces[found++] = piece;
    }
    if (!found || offset > disk_bytes || bytes > disk_bytes - offset) refuse("a request beyond the end");
    if (is_read) chain->written_bytes = bytes;
    transfer(chain, is_read, offset, found, mapping, in_one_mapping);
}

static void begin_request(struct chain *chain, const struct vring_desc *pieces, unsigned count) {
    if (count < 2 || pieces[0].len != sizeof(struct virtio_blk_outhdr) || pieces[count - 1].len < 1) refuse("a request");
    struct virtio_blk_outhdr header = *(struct virtio_blk_outhdr *)in_guest(pieces[0].addr, sizeof header, NULL);
    chain->status = in_guest(pieces[count - 1].addr, 1, NULL);
    chain->pending = chain->has_failed = chain->written_bytes = 0;
    chain->queue->under_way++;
    if (header.type == VIRTIO_BLK_T_IN || header.type == VIRTIO_BLK_T_OUT) {
        begin_transfer(chain, header.type == VIRTIO_BLK_T_IN, header.sector * SECTOR_BYTES, pieces + 1, count - 2);
        return;
    }
    struct io_uring_sqe *made = entry(chain, CHAIN);
    if (header.type == VIRTIO_BLK_T_FLUSH) {
        io_uring_prep_fsync(made, 0, IORING_FSYNC_DATASYNC);
    } else if (header.type == VIRTIO_BLK_T_DISCARD || header.type == VIRTIO_BLK_T_WRITE_ZEROES) {
        struct virtio_blk_discard_write_zeroes range = *(struct virtio_blk_discard_write_zeroes *)in_guest(pieces[1].addr, sizeof range, NULL);
        int how = header.type == VIRTIO_BLK_T_DISCARD ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
        uint64_t bytes = (uint64_t)range.num_sectors * SECTOR_BYTES;
        io_uring_prep_fallocate(made, 0, how | FALLOC_FL_KEEP_SIZE, range.sector * SECTOR_BYTES, bytes);
    } else {
        refuse("a request of an unknown kind");
    }
    submit(chain, made);
}

static void take_chain(struct queue *queue, uint16_t head) {
    struct vring_desc pieces[SEGMENTS_MAX + 2];
    const struct vring_desc *table = queue->ring.desc;
    unsigned count = 0, entries = queue->ring.num;
    uint16_t next = head;
    if (head >= entries) refuse("a head");
    if (table[head].flags & VRING_DESC_F_INDIRECT) {
        entries = table[head].len / sizeof *table, next = 0;
        table = in_guest(table[head].addr, table[head].len, NULL);
    }
    do {
        if (next >= entries || count == sizeof pieces / sizeof *pieces) refuse("a chain");
        pieces[count] = table[next];
        next = pieces[count].next;
    } while (pieces[count++].flags & VRING_DESC_F_NEXT);
    struct chain *chain = &queue->chains[head];
    chain->queue = queue, chain->head = head;
    begin_request(chain, pieces, count);
}

/* --- Rings ---------------------------------------------------------------------------------------------------------------------- */

/* Takes a turn's share of what is available; whether more is. */
static int take(struct queue *queue) {
    uint16_t end = __atomic_load_n(&queue->ring.avail->idx, __ATOMIC_ACQUIRE);
    for (unsigned count = 0; queue->taken != end && count < CHAINS_A_TURN; count++, queue->taken++)
        take_chain(queue, queue->ring.avail->ring[queue->taken % queue->ring.num]);
    if (queue->taken != end) return 1;
    /* The driver kicks for the next one, unless it came meanwhile. */
    __atomic_store_n(available_event(&queue->ring), queue->taken, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(&queue->ring.avail->idx, __ATOMIC_ACQUIRE) != queue->taken;
}

/* Shows what has ended, and calls the driver if it waits for any of it. */
static void tell(struct queue *queue) {
    uint64_t one = 1;
    uint16_t before = queue->told;
    if (before == queue->used) return;
    __atomic_store_n(&queue->ring.used->idx, queue->used, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    queue->told = queue->used;
    if (features & 1ull << VIRTIO_RING_F_EVENT_IDX) {
        if (!vring_need_event(__atomic_load_n(used_event(&queue->ring), __ATOMIC_RELAXED), queue->used, before)) return;
    } else if (__atomic_load_n(&queue->ring.avail->flags, __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT) {
        return;
    }
    if (write(queue->call_fd, &one, sizeof one) < 0 && errno != EAGAIN) die("call");
}

/* Waits, if there is nothing to do, and takes what has ended. 1: the front end says something. */
static int turn(int waits) {
    unsigned head, count = 0;
    struct io_uring_cqe *done;
    int has_message = 0, error = io_uring_submit_and_wait(&uring, waits);
    if (error < 0 && error != -EINTR) errno = -error, die("io_uring_enter");
    if (!waits) io_uring_get_events(&uring);
    io_uring_for_each_cqe(&uring, head, done) {
        void *whose = (void *)(uintptr_t)(done->user_data >> TAG_BITS << TAG_BITS);
        enum tag tag = done->user_data & ((1 << TAG_BITS) - 1);
        count++;
        if (tag == CHAIN) {
            struct chain *chain = whose;
            chain->has_failed |= done->res < 0;
            if (!--chain->pending) end_chain(chain);
        } else if (tag == CHANNEL) {
            has_message = 1;
        } else if (tag == KICK && !(done->flags & IORING_CQE_F_MORE) && done->res >= 0) {
            watch(((struct queue *)whose)->kick_fd, whose, KICK);
        }
    }
    io_uring_cq_advance(&uring, count);
    for (unsigned at = 0; at < queue_count; at++)
        if (queues[at].is_started) tell(&queues[at]);
    return has_message;
}

static void stop(struct queue *queue) {
    if (!queue->is_started) return;
    while (queue->under_way) turn(1);
    tell(queue);
    io_uring_prep_poll_remove(entry(NULL, NOTHING), (uintptr_t)queue | KICK);
    io_uring_submit(&uring);
    close(queue->kick_fd), close(queue->call_fd);
    queue->is_started = 0;
}

/* --- The protocol --------------------------------------------------------------------------------------------------------------- */

static struct queue *queue_of(uint64_t number) {
    if (number >= queue_count) refuse("a ring's number");
    return &queues[number];
}

static void set_addresses(const struct message *message) {
    struct queue *queue = queue_of(message->rings.index);
    unsigned count = queue->ring.num;
    queue->ring.desc = of_user(message->rings.descriptors, count * sizeof(struct vring_desc));
    queue->ring.avail = of_user(message->rings.available, (count + 3) * sizeof(uint16_t));
    queue->ring.used = of_user(message->rings.used, count * sizeof(struct vring_used_elem) + 3 * sizeof(uint16_t));
    queue->used = queue->told = queue->ring.used->idx;
}

static void answer(struct message *message, uint32_t size) {
    if (send_message(channel, message, message->request, IS_REPLY, size, -1)) die("answer");
}

static void answer_config(struct message *message) {
    struct virtio_blk_config config = {
        .capacity = disk_bytes / SECTOR_BYTES, .seg_max = SEGMENTS_MAX, .blk_size = SECTOR_BYTES, .num_queues = queue_count,
        .max_discard_sectors = 1 << 22, .max_discard_seg = 1, .discard_sector_alignment = 8,
        .max_write_zeroes_sectors = 1 << 22, .max_write_zeroes_seg = 1,
    };
    memcpy(message->config.data, &config, CONFIG_BYTES);
    answer(message, message->size);
}

/* Those that have an answer of their own; 0: it is none of them. */
static int answer_question(struct message *message) {
    uint64_t blk = 1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE | 1ull << VIRTIO_BLK_F_MQ;
    blk |= 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES;
    uint64_t ring = VERSION_1 | HAS_PROTOCOL_FEATURES | 1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_RING_F_EVENT_IDX;
    struct queue *queue;
    switch (message->request) {
    case GET_FEATURES: message->number = blk | ring; break;
    case GET_PROTOCOL_FEATURES: message->number = PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG; break;
    case GET_QUEUE_NUM: message->number = queue_count; break;
    case GET_CONFIG: answer_config(message); return 1;
    case GET_VRING_BASE:
        queue = queue_of(message->ring.index);
        stop(queue);
        message->ring.value = queue->taken;
        break;
    default: return 0;
    }
    answer(message, sizeof message->number);
    return 1;
}

static void do_as_told(struct message *message, const int *fds, int fd_count) {
    struct queue *queue;
    switch (message->request) {
    case SET_FEATURES: features = message->number; break;
    case SET_PROTOCOL_FEATURES: protocol = message->number; break;
    case SET_MEM_TABLE: map_memory(message, fds, fd_count); break;
    case SET_VRING_NUM:
        if (message->ring.value > RING_MAX || !message->ring.value) refuse("a ring's size");
        queue_of(message->ring.index)->ring.num = message->ring.value;
        break;
    case SET_VRING_BASE: queue_of(message->ring.index)->taken = message->ring.value; break;
    case SET_VRING_ADDR: set_addresses(message); break;
    case SET_VRING_KICK: queue_of(message->number & 0xFF)->kick_fd = fd_count == 1 ? fds[0] : (refuse("a kick"), -1); break;
    case SET_VRING_CALL: queue_of(message->number & 0xFF)->call_fd = fd_count == 1 ? fds[0] : (refuse("a call"), -1); break;
    case SET_VRING_ENABLE:
        queue = queue_of(message->ring.index);
        if (message->ring.value && !queue->is_started) queue->is_started = 1, watch(queue->kick_fd, queue, KICK);
        break;
    }
    if (protocol & PROTOCOL_REPLY_ACK && message->flags & NEEDS_REPLY) message->number = 0, answer(message, sizeof message->number);
}

/* 0: the front end has gone. */
static int hear(void) {
    struct message message;
    int fds[REGIONS_MAX], fd_count = receive_message(channel, &message, fds);
    if (fd_count < 0) return 0;
    if (!answer_question(&message)) do_as_told(&message, fds, fd_count);
    return 1;
}

static void serve(void) {
    do {
        watch(channel, NULL, CHANNEL);
        for (int more = 0; !turn(!more);) {
            more = 0;
            for (unsigned at = 0; at < queue_count; at++)
                if (queues[at].is_started) more |= take(&queues[at]);
        }
    } while (hear());
    for (unsigned at = 0; at < queue_count; at++) stop(&queues[at]);
    forget_memory();
    close(channel);
    protocol = 0;
}

int main(int argc, char **words) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct io_uring_params parameters = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CQSIZE};
    if (argc != 4 || strlen(words[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: ring_server SOCKET DEVICE QUEUES\n");
        return 2;
    }
    int device = open(words[2], O_RDWR | O_DIRECT | O_CLOEXEC);
    struct stat status;
    queue_count = atoi(words[3]);
    if (device < 0 || fstat(device, &status) || !queue_count || queue_count > QUEUES_MAX) die(words[2]);
    disk_bytes = status.st_size;
    if (S_ISBLK(status.st_mode) && ioctl(device, BLKGETSIZE64, &disk_bytes)) die(words[2]);
    for (unsigned at = 0; at < queue_count; at++)
        if (!(queues[at].chains = calloc(RING_MAX, sizeof *queues[at].chains))) die("memory");
    parameters.cq_entries = 8 * ENTRIES;
    int error = io_uring_queue_init_params(ENTRIES, &uring, &parameters);
    if (error) errno = -error, die("io_uring");
    if (io_uring_register_files(&uring, &device, 1)) refuse("the device cannot be registered");
    io_uring_register_ring_fd(&uring);
    struct io_uring_probe *probe = io_uring_get_probe_ring(&uring);
    has_fixed_vectors = probe && probe->last_op >= WRITEV_FIXED && probe->ops_len > WRITEV_FIXED;
    io_uring_free_probe(probe);
    strcpy(address.sun_path, words[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1)) die(words[1]);
    while ((channel = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) serve();
    die("accept");
}
