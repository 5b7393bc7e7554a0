// SPDX-License-Identifier: Apache-2.0
/* A light front end of vhost-user-blk, as a guest's driver is one: a client of one disk or of many, in one thread.

     front [OPTION...] SOCKET...

   On each queue of each disk `--depth` requests are always under way. Prints one line of JSON: what was answered, in which time, and with how
   much CPU of its own. The options and what they are without being given stand in `choices` below.

   --verify: each write carries its place and a generation. Reads under way are judged, and in the end all that was written is read again.
   --reconnect: a server that dies is waited for, and gets the same memory, rings and in-flight area: no request is sent twice by the guest.
   --state FILE: what must be where, by --verify; read first if it is there, so that another run can judge what this one has left. With no
   word of when to end, that is all it does.

   --wait: it says "attached" when it is, and begins when it can read a line. So whoever measures leaves out what attaching costs a server;
   what detaching costs comes after the figures.

   It costs little, so that what is measured is the server: the call descriptors are never read, and the server is kicked when it asks. */

#define _GNU_SOURCE
#include <getopt.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>

#include "front_content.h"
#include "front_disk.h"

enum { EVENTS_MAX = 64, LOOK_EVERY = 16, RETRY_US = 2000, RING_MIN = 128, RING_MAX = 1024, FINE_BITS = 6, FINE = 1 << FINE_BITS };

static struct options options = {
    .queues = 1, .depth = 1, .segments = 1, .request_bytes = 4096, .seed = 1, .indirect = 1, .event_index = 1, .inflight = 1,
    .patience_seconds = 60,
};
static struct disk *disks;
static unsigned disk_count;
static int poll_fd;
static uint64_t rng, started, under_way, now, end_ns, last_answer_ns, pause_ns;
static uint64_t counts[KINDS], errors, checked, lost, reconnects, kicks, sleeps;
static uint64_t times[64 * FINE], longest_ns;   /* how many requests took so long: see slot_of */
static enum { LOAD, LAST_FLUSH, CHECK } phase;   /* what was asked for; one flush of each disk; all is read again */
static struct queue **ready;
static unsigned ready_count;

static uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static uint64_t draw(void) {
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    return rng;
}

/* --- How long requests took: in steps of a sixty-fourth part -------------------------------------------------------------------- */

static unsigned slot_of(uint64_t took_ns) {
    if (took_ns < FINE) return took_ns;
    unsigned power = 63 - __builtin_clzll(took_ns);
    return (power - FINE_BITS + 1) * FINE + (took_ns >> (power - FINE_BITS)) % FINE;
}

static double percentile_us(double share) {
    uint64_t all = 0, passed = 0;
    for (unsigned slot = 0; slot < sizeof times / sizeof *times; slot++) all += times[slot];
    for (unsigned slot = 0; all && slot < sizeof times / sizeof *times; slot++)
        if ((passed += times[slot]) >= share * all) {
            double upper = slot < FINE ? slot : (double)(FINE + slot % FINE + 1) * (1ull << (slot / FINE - 1));
            return (upper < longest_ns ? upper : longest_ns) / 1000;
        }
    return 0;
}

/* --- What is asked next ------------------------------------------------------------------------------------------------------------ */

static int is_over(const struct disk *disk) {
    if (phase == CHECK) return disk->next == disk->positions;
    if (phase == LAST_FLUSH) return disk->next == 1;
    if (options.once) return disk->next == disk->positions;
    return options.count ? started >= options.count : now >= end_ns;
}

static enum kind kind_of_next(struct queue *queue) {
    unsigned all = 0, kind = READ;
    if (phase != LOAD) return phase == CHECK ? READ : FLUSH;
    if (options.flush_every && queue->writes_since_flush >= options.flush_every) return FLUSH;
    for (unsigned at = 0; at < KINDS; at++) all += options.weights[at];
    for (uint64_t drawn = draw() % all; drawn >= options.weights[kind]; kind++) drawn -= options.weights[kind];
    return kind;
}

/* 0: there is no more. */
static int choose_position(struct disk *disk, uint64_t *position) {
    if (phase == CHECK) {
        while (disk->next < disk->positions && disk->content[disk->next] == UNKNOWN) disk->next++;
        if (disk->next == disk->positions) return 0;
        *position = disk->next++;
        return 1;
    }
    do {
        if (options.once) *position = disk->order[disk->next++];
        else if (options.sequential) *position = disk->next++ % disk->positions;
        else *position = draw() % disk->positions;
    } while (options.verify && disk->is_busy[*position]);
    return 1;
}

static void describe(struct queue *queue, struct request *request, struct vring_desc *chain, unsigned first) {
    const struct disk *disk = queue->disk;
    unsigned at = 0, pieces = request->kind == READ || request->kind == WRITE ? options.segments : 0;
    chain[at++] = (struct vring_desc){guest_address(disk, request->header), sizeof *request->header, VRING_DESC_F_NEXT, first + 1};
    for (unsigned number = 0; number < pieces; number++, at++) {
        uint64_t bytes = piece_begin(&options, number + 1) - piece_begin(&options, number);
        chain[at] = (struct vring_desc){guest_address(disk, piece(request, &options, number)), bytes,
                                        VRING_DESC_F_NEXT | (request->kind == READ ? VRING_DESC_F_WRITE : 0), first + at + 1};
    }
    if (request->kind == ZERO || request->kind == TRIM) {
        chain[at] = (struct vring_desc){guest_address(disk, request->range), sizeof *request->range, VRING_DESC_F_NEXT, first + at + 1};
        at++;
    }
    chain[at++] = (struct vring_desc){guest_address(disk, request->status), 1, VRING_DESC_F_WRITE, 0};
    if (!options.indirect) return;
    queue->ring.desc[request->head] =
        (struct vring_desc){guest_address(disk, request->table), at * sizeof *request->table, VRING_DESC_F_INDIRECT, 0};
}

static const uint32_t types[KINDS] = {
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
};

/* 0: nothing is left to ask. */
static int start(struct queue *queue) {
    struct disk *disk = queue->disk;
    struct request *request = queue->idle[queue->idle_count - 1];
    if (is_over(disk)) return 0;
    request->kind = kind_of_next(queue);
    if (request->kind == FLUSH) queue->writes_since_flush = 0, disk->next += phase == LAST_FLUSH;
    else if (!choose_position(disk, &request->position)) return 0;
    else if (request->kind != READ) queue->writes_since_flush++;
    queue->idle_count--;
    uint64_t sector = request->position * options.stride_bytes / SECTOR_BYTES;
    int has_data = request->kind == READ || request->kind == WRITE;
    *request->header = (struct virtio_blk_outhdr){.type = types[request->kind], .sector = has_data ? sector : 0};
    *request->range = (struct virtio_blk_discard_write_zeroes){sector, options.request_bytes / SECTOR_BYTES, 0};
    *request->status = 0xFF;
    if (options.verify && request->kind != FLUSH) {
        disk->is_busy[request->position] = 1;
        if (request->kind == WRITE) request->generation = disk->generation++, fill_data(request, &options);
    }
    describe(queue, request, options.indirect ? request->table : &queue->ring.desc[request->head], options.indirect ? 0 : request->head);
    request->under_way = 1, request->began_ns = now;
    uint16_t next = queue->ring.avail->idx;
    queue->ring.avail->ring[next % queue->ring.num] = request->head;
    __atomic_store_n(&queue->ring.avail->idx, next + 1, __ATOMIC_RELEASE);
    started++, under_way++;
    return 1;
}

/* --- Rings ------------------------------------------------------------------------------------------------------------------------- */

static void kick(struct queue *queue, int always) {
    uint16_t before = queue->kicked, after = queue->ring.avail->idx;
    uint64_t one = 1;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    queue->kicked = after;
    if (!always) {
        if (before == after) return;
        if (queue->disk->features & 1ull << VIRTIO_RING_F_EVENT_IDX) {
            if (!vring_need_event(__atomic_load_n(available_event(&queue->ring), __ATOMIC_RELAXED), after, before)) return;
        } else if (__atomic_load_n(&queue->ring.used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY) {
            return;
        }
    }
    kicks++;
    if (write(queue->kick_fd, &one, sizeof one) < 0 && errno != EAGAIN) die("kick");
}

static void finish(struct queue *queue, struct request *request) {
    struct disk *disk = queue->disk;
    uint64_t took_ns = now - request->began_ns;
    int has_failed = *request->status != VIRTIO_BLK_S_OK;
    if (!request->under_way) errno = EPROTO, die("a request is answered twice");
    if (phase != CHECK) {
        times[slot_of(took_ns)]++, counts[request->kind]++;
        if (took_ns > longest_ns) longest_ns = took_ns;
    }
    errors += has_failed;
    if (options.verify && request->kind != FLUSH) {
        disk->is_busy[request->position] = 0;
        if (request->kind == READ && !has_failed && disk->content[request->position] != UNKNOWN) {
            checked++;
            lost += !is_as_told(disk, request, &options);
        }
        note(disk, request, has_failed);
    }
    request->under_way = 0, under_way--;
    queue->idle[queue->idle_count++] = request;
}

/* Takes what is answered and asks for as much again; whether there was anything. */
static int turn(struct queue *queue) {
    uint16_t end = __atomic_load_n(&queue->ring.used->idx, __ATOMIC_ACQUIRE);
    if (end == queue->taken) return 0;
    now = now_ns();
    if (now - last_answer_ns > pause_ns) pause_ns = now - last_answer_ns;
    last_answer_ns = now;
    for (; queue->taken != end; queue->taken++) {
        uint32_t number = queue->ring.used->ring[queue->taken % queue->ring.num].id / (options.indirect ? 1 : options.segments + 2);
        if (number >= options.depth) errno = EPROTO, die("a chain that nobody sent is answered");
        finish(queue, &queue->requests[number]);
    }
    while (queue->idle_count && start(queue)) {}
    kick(queue, 0);
    return 1;
}

/* Whether the server will call when it answers the next one: it has answered none meanwhile. */
static int may_sleep(struct queue *queue) {
    if (queue->disk->features & 1ull << VIRTIO_RING_F_EVENT_IDX) __atomic_store_n(used_event(&queue->ring), queue->taken, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(&queue->ring.used->idx, __ATOMIC_ACQUIRE) == queue->taken;
}

static void make_ready(struct queue *queue) {
    if (!queue->is_ready) queue->is_ready = 1, ready[ready_count++] = queue;
}

/* --- A server that comes and goes -------------------------------------------------------------------------------------------------- */

static void watch(int fd, uint32_t events, void *whose, uint64_t tag) {
    struct epoll_event event = {.events = events, .data.u64 = (uintptr_t)whose | tag};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
}

/* Without an in-flight area the server knows only what is available behind its used ring: so that is made what has had no answer. */
static void rewind_ring(struct queue *queue) {
    uint16_t next = queue->taken;
    for (unsigned at = 0; at < options.depth; at++)
        if (queue->requests[at].under_way) queue->ring.avail->ring[next++ % queue->ring.num] = queue->requests[at].head;
    if (next != queue->ring.avail->idx) errno = EPROTO, die("the rings do not fit together");
}

static void attach_patiently(struct disk *disk) {
    uint64_t deadline = now_ns() + options.patience_seconds * 1e9;
    while (attach(disk, &options)) {
        if (!options.reconnect || now_ns() > deadline) die(disk->path);
        usleep(RETRY_US);
    }
    watch(disk->channel, EPOLLIN, disk, 1);
}

static void go_on(struct disk *disk) {
    if (!options.reconnect) errno = ECONNRESET, die(disk->path);
    for (unsigned at = 0; at < options.queues; at++) {
        while (turn(&disk->queues[at])) {}
        if (!(disk->protocol & PROTOCOL_INFLIGHT)) rewind_ring(&disk->queues[at]);
    }
    reconnects++;
    attach_patiently(disk);
    for (unsigned at = 0; at < options.queues; at++) kick(&disk->queues[at], 1), make_ready(&disk->queues[at]);
}

/* --- All together ------------------------------------------------------------------------------------------------------------------ */

static void look(int wait_ms) {
    struct epoll_event events[EVENTS_MAX];
    int count = epoll_wait(poll_fd, events, EVENTS_MAX, wait_ms);
    if (count < 0 && errno != EINTR) die("epoll_wait");
    if (!count && wait_ms) errno = ETIMEDOUT, die("no answer");
    for (int at = 0; at < count; at++) {
        void *whose = (void *)(uintptr_t)(events[at].data.u64 & ~1ull);
        if (events[at].data.u64 & 1) go_on(whose);
        else make_ready(whose);
    }
}

static void ask_and_take(void) {
    for (unsigned at = 0; phase != LOAD && at < disk_count; at++) disks[at].next = 0;
    now = last_answer_ns = now_ns(), end_ns = now + options.seconds * 1e9;
    for (unsigned at = 0; at < disk_count * options.queues; at++) {
        struct queue *queue = &disks[at / options.queues].queues[at % options.queues];
        while (queue->idle_count && start(queue)) {}
        kick(queue, 0), make_ready(queue);
    }
    for (unsigned round = 1; under_way; round++) {
        if (!ready_count) sleeps++, look(options.patience_seconds * 1000);
        else if (round % LOOK_EVERY == 0) look(0);
        unsigned left = 0;
        for (unsigned at = 0; at < ready_count; at++) {
            struct queue *queue = ready[at];
            turn(queue);
            if (may_sleep(queue)) queue->is_ready = 0;
            else ready[left++] = queue;
        }
        ready_count = left;
    }
}

static double cpu_seconds(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void make_order(struct disk *disk) {
    disk->order = zeroed(disk->positions, sizeof *disk->order);
    for (uint64_t at = 0; at < disk->positions; at++) {
        uint64_t other = options.sequential ? at : draw() % (at + 1);
        disk->order[at] = disk->order[other], disk->order[other] = at;
    }
}

static void begin(struct disk *disk, const char *path) {
    make_disk(disk, path, &options);
    for (unsigned at = 0; at < options.queues; at++)
        for (unsigned number = 0; number < options.depth; number++)
            for (uint64_t byte = 0; byte + 8 <= options.request_bytes; byte += 8) {
                uint64_t word = draw();
                memcpy(disk->queues[at].requests[number].data + byte, &word, sizeof word);
            }
    attach_patiently(disk);
    uint64_t bytes = options.range_bytes ? options.range_bytes : disk->capacity_bytes;
    disk->positions = bytes < options.request_bytes ? 0 : (bytes - options.request_bytes) / options.stride_bytes + 1;
    if (!disk->positions || bytes > disk->capacity_bytes) errno = ERANGE, die(path);
    if (options.verify && disk->positions < 2 * options.depth * options.queues) errno = ERANGE, die("too few places for so many requests");
    if (options.once) make_order(disk);
    if (options.verify) make_content(disk, &options);
    for (unsigned at = 0; at < options.queues; at++) watch(disk->queues[at].call_fd, EPOLLIN | EPOLLET, &disk->queues[at], 0);
}

static struct { struct option option; const char *what; unsigned *number; uint64_t *large; int *choice; double *seconds; } choices[] = {
    {{"queues", 1, 0, 0}, "1", &options.queues, 0, 0, 0},
    {{"depth", 1, 0, 0}, "requests under way on each queue: 1", &options.depth, 0, 0, 0},
    {{"ring-size", 1, 0, 0}, "entries: as many as are needed, at least 128", &options.ring_size, 0, 0, 0},
    {{"bytes", 1, 0, 0}, "of a request: 4096", 0, &options.request_bytes, 0, 0},
    {{"stride", 1, 0, 0}, "requests begin at multiples of it: their size", 0, &options.stride_bytes, 0, 0},
    {{"range", 1, 0, 0}, "bytes of the disk that are used: all", 0, &options.range_bytes, 0, 0},
    {{"segments", 1, 0, 0}, "pieces of a request's data: 1", &options.segments, 0, 0, 0},
    {{"shift", 1, 0, 0}, "bytes behind a page's begin where data begin: 0", 0, &options.shift_bytes, 0, 0},
    {{"read", 1, 0, 0}, "share of reads; without any share: 1", &options.weights[READ], 0, 0, 0},
    {{"write", 1, 0, 0}, "share of writes", &options.weights[WRITE], 0, 0, 0},
    {{"zero", 1, 0, 0}, "share of write-zeroes", &options.weights[ZERO], 0, 0, 0},
    {{"trim", 1, 0, 0}, "share of discards", &options.weights[TRIM], 0, 0, 0},
    {{"flush-every", 1, 0, 0}, "so many requests of a queue that are no reads, a flush; 0: none", &options.flush_every, 0, 0, 0},
    {{"last-flush", 1, 0, 0}, "a flush in the end, which is part of the time: 0", 0, 0, &options.last_flush, 0},
    {{"sequential", 1, 0, 0}, "0 or 1: 0", 0, 0, &options.sequential, 0},
    {{"once", 1, 0, 0}, "each place once, then it ends: 0", 0, 0, &options.once, 0},
    {{"seconds", 1, 0, 0}, "when to end", 0, 0, 0, &options.seconds},
    {{"count", 1, 0, 0}, "of requests when to end", 0, &options.count, 0, 0},
    {{"seed", 1, 0, 0}, "1", 0, &options.seed, 0, 0},
    {{"indirect", 1, 0, 0}, "descriptors: 1", 0, 0, &options.indirect, 0},
    {{"event-index", 1, 0, 0}, "if the server has it: 1", 0, 0, &options.event_index, 0},
    {{"inflight", 1, 0, 0}, "an in-flight area, if the server has it: 1", 0, 0, &options.inflight, 0},
    {{"mem-slots", 1, 0, 0}, "memory is handed over by ADD_MEM_REG, if the server has it: 0", 0, 0, &options.mem_slots, 0},
    {{"wait", 1, 0, 0}, "0", 0, 0, &options.wait, 0},
    {{"verify", 1, 0, 0}, "0", 0, 0, &options.verify, 0},
    {{"reconnect", 1, 0, 0}, "0", 0, 0, &options.reconnect, 0},
    {{"patience", 1, 0, 0}, "seconds without any answer that end it: 60", 0, 0, 0, &options.patience_seconds},
    {{"state", 1, 0, 0}, "a file", 0, 0, 0, 0},
};
enum { CHOICES = sizeof choices / sizeof *choices };

static void usage(void) {
    fprintf(stderr, "usage: front [OPTION...] SOCKET...\n");
    for (unsigned at = 0; at < CHOICES; at++) fprintf(stderr, "  --%-14s %s\n", choices[at].option.name, choices[at].what);
    exit(2);
}

static void read_options(int argc, char **words) {
    struct option names[CHOICES + 1] = {{0}};
    int at = 0;
    for (unsigned number = 0; number < CHOICES; number++) names[number] = choices[number].option;
    while (getopt_long(argc, words, "", names, &at) == 0) {
        if (choices[at].number) *choices[at].number = strtoul(optarg, NULL, 0);
        else if (choices[at].large) *choices[at].large = strtoull(optarg, NULL, 0);
        else if (choices[at].choice) *choices[at].choice = atoi(optarg);
        else if (choices[at].seconds) *choices[at].seconds = atof(optarg);
        else options.state_path = optarg;
    }
    unsigned all = 0, descriptors = options.depth * (options.indirect ? 1 : options.segments + 2);
    for (unsigned kind = 0; kind < KINDS; kind++) all += options.weights[kind];
    if (!all) options.weights[READ] = 1;
    if (!options.stride_bytes) options.stride_bytes = options.request_bytes;
    if (!options.ring_size)
        for (options.ring_size = RING_MIN; options.ring_size < descriptors; options.ring_size *= 2) {}
    int is_bad = optind == argc || !options.queues || options.queues > QUEUES_MAX || !options.depth || !options.segments;
    is_bad |= !options.request_bytes || options.request_bytes % SECTOR_BYTES || options.stride_bytes % SECTOR_BYTES;
    is_bad |= options.segments > options.request_bytes || options.ring_size < descriptors || options.ring_size > RING_MAX;
    is_bad |= options.ring_size & (options.ring_size - 1) || !(options.seconds > 0 || options.count || options.once || options.state_path);
    is_bad |= options.verify && options.stride_bytes < options.request_bytes;
    is_bad |= options.state_path && (!options.verify || argc - optind > 1);
    if (is_bad) usage();
}

int main(int argc, char **words) {
    read_options(argc, words);
    rng = options.seed * 0x9E3779B97F4A7C15ull | 1;
    disk_count = argc - optind, disks = zeroed(disk_count, sizeof *disks);
    ready = zeroed(disk_count * options.queues, sizeof *ready);
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (poll_fd < 0) die("epoll_create1");
    for (unsigned at = 0; at < disk_count; at++) begin(&disks[at], words[optind + at]);
    if (options.wait) printf("attached\n"), fflush(stdout), getchar();
    double cpu = cpu_seconds();
    uint64_t began = now_ns();
    ask_and_take();
    if (options.last_flush) phase = LAST_FLUSH, ask_and_take();
    double seconds = (now_ns() - began) / 1e9;
    cpu = cpu_seconds() - cpu;
    if (options.verify) {
        phase = CHECK;
        ask_and_take();
    }
    if (options.state_path) save_content(&disks[0], &options);
    uint64_t operations = counts[READ] + counts[WRITE] + counts[ZERO] + counts[TRIM];
    printf("{\"operations\": %lu, \"reads\": %lu, \"writes\": %lu, \"zeroes\": %lu, \"trims\": %lu, \"flushes\": %lu, \"errors\": %lu, ", operations,
           counts[READ], counts[WRITE], counts[ZERO], counts[TRIM], counts[FLUSH], errors);
    printf("\"seconds\": %.6f, \"cpu_seconds\": %.6f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, ", seconds, cpu,
           percentile_us(0.5), percentile_us(0.99), longest_ns / 1e3);
    printf("\"kicks\": %lu, \"sleeps\": %lu, \"reconnects\": %lu, \"pause_seconds\": %.4f, ", kicks, sleeps, reconnects, pause_ns / 1e9);
    printf("\"checked\": %lu, \"lost\": %lu, \"capacity_bytes\": %lu, \"features\": %lu, \"protocol\": %lu}\n", checked, lost, disks[0].capacity_bytes,
           disks[0].features, disks[0].protocol);
    fflush(stdout);
    for (unsigned at = 0; at < disk_count; at++)
        if (detach(&disks[at], &options)) errno = EPROTO, die("the rings do not end where the guest has");
    return 0;
}
