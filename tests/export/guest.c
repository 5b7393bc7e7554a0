// SPDX-License-Identifier: Apache-2.0
/* A guest's disk driver as the host sees it: virtio-blk behind vhost-user, one ring, in one thread.

     guest SOCKET REQUESTS SEED FLAVOUR TRIM_SECTORS STATE

   DEPTH requests are always under way, none of which overlaps another. Every sector that is written is filled with one word: its own
   number and a stamp, so that a sector of another place, of another time, or in parts, is seen. A request that fails is told, and ends it
   with 1; so does a read of anything but what was acknowledged. As any guest, it sends nothing twice. FLAVOUR:

     first    whole blocks of 4 KiB at random places: writes and nothing else
     mixed    writes, trims, write-zeroes and reads of any number of sectors at any place
     flushes  as mixed, with flushes among them

   A trim makes zeros of the whole pieces of TRIM_SECTORS that it covers, and leaves the rest as it was: that is the disk's promise.
   Prints a line whenever another PROGRESS requests have been answered. After REQUESTS of them STATE gets a 32-bit word for each sector,
   what must be there. 0: what was there at first; 1: zeros; else the stamp. The last line tells how many of each kind were answered. */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { DEPTH = 32, RING = 128, SECTOR = 512, WORDS = SECTOR / 8, SECTORS_MAX = 32, VOID_SECTORS_MAX = 4096, HEADS = 4, PROGRESS = 100 };
enum { READ, WRITE, TRIM, ZERO, FLUSH, KINDS };
enum { AS_AT_FIRST, ZEROS, FIRST_STAMP };
static const uint32_t types[KINDS] = {
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_FLUSH,
};
static const char *const names[KINDS] = {"reads", "writes", "trims", "zeroes", "flushes"};

/* What stands in the memory that is shared with the device. Each request has three descriptors: what it is, its data, how it ended. */
struct slot {
    struct virtio_blk_outhdr head;
    struct virtio_blk_discard_write_zeroes range;
    uint8_t status;
    uint64_t data[SECTORS_MAX * WORDS] __attribute__((aligned(4096)));
};
struct shared {
    struct vring_desc descriptors[RING];
    struct { uint16_t flags, index, ring[RING]; } available;
    struct { uint16_t flags, index; struct vring_used_elem ring[RING]; } used __attribute__((aligned(4096)));
    struct slot slots[DEPTH];
};

/* vhost-user: a header of three words, then the payload. */
enum { SET_FEATURES = 2, GET_FEATURES = 1, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9, SET_VRING_BASE = 10,
       SET_VRING_KICK = 12, SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18,
       GET_CONFIG = 24 };
enum { VERSION = 1, PROTOCOL_CONFIG = 1 << 9 };
static const uint64_t HAS_PROTOCOL = 1ull << 30, VERSION_1 = 1ull << 32;
struct __attribute__((packed)) message {
    uint32_t request, flags, size;
    union __attribute__((packed)) {
        uint64_t number;
        struct { uint32_t index, value; } ring;
        struct { uint32_t index, flags; uint64_t descriptors, used, available, log; } rings;
        struct { uint32_t count, padding; uint64_t guest, size, user, offset; } memory;
        struct __attribute__((packed)) { uint32_t offset, size, flags; uint64_t capacity; } config;     /* the beginning of the device's */
    };
};
enum { HEADER = 12 };

static int channel, kick_fd, call_fd;
static struct shared *shared;
static uint64_t sectors, trim_sectors, rng, counts[KINDS];
static uint32_t *state, stamp = FIRST_STAMP;
static uint8_t *busy;
static uint16_t taken;      /* of the used ring */
static struct { int kind; uint64_t first, count; uint32_t stamp; } sent[DEPTH];

static void die(const char *what) {
    fprintf(stderr, "guest: %s: %s\n", what, errno ? strerror(errno) : "unexpected");
    exit(1);
}

static uint64_t draw(uint64_t below) {
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    return (rng * 0x2545F4914F6CDD1Dull >> 11) % below;
}

/* --- The device ---------------------------------------------------------------------------------------------------------------- */

static void say(struct message *message, uint32_t request, uint32_t size, int descriptor) {
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec bytes = {message, HEADER + size};
    struct msghdr out = {.msg_iov = &bytes, .msg_iovlen = 1};
    message->request = request, message->flags = VERSION, message->size = size;
    if (descriptor >= 0) {
        out.msg_control = control, out.msg_controllen = sizeof control;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&out);
        rights->cmsg_level = SOL_SOCKET, rights->cmsg_type = SCM_RIGHTS, rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &descriptor, sizeof descriptor);
    }
    if (sendmsg(channel, &out, MSG_NOSIGNAL) != (ssize_t)(HEADER + size)) die("vhost-user");
}

static void hear(struct message *message) {
    errno = 0;
    if (recv(channel, message, HEADER, MSG_WAITALL) != HEADER || message->size > sizeof *message - HEADER) die("vhost-user");
    if (!message->size || recv(channel, &message->number, message->size, MSG_WAITALL) != (ssize_t)message->size) die("vhost-user");
}

static uint64_t ask(uint32_t request) {
    struct message message;
    say(&message, request, 0, -1);
    hear(&message);
    return message.number;
}

static void tell(uint32_t request, uint64_t number, int descriptor) {
    struct message message = {.number = number};
    say(&message, request, sizeof message.number, descriptor);
}

static void tell_ring(uint32_t request, uint32_t value) {
    struct message message = {.ring = {0, value}};
    say(&message, request, sizeof message.ring, -1);
}

static void attach(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct message message;
    uint64_t wanted = 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES | 1ull << VIRTIO_BLK_F_FLUSH;
    wanted |= VERSION_1 | HAS_PROTOCOL;
    int memory = memfd_create("guest", MFD_CLOEXEC);
    if (memory < 0 || ftruncate(memory, sizeof *shared)) die("memory");
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (shared == MAP_FAILED) die("memory");
    kick_fd = eventfd(0, EFD_CLOEXEC), call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (channel < 0 || connect(channel, (struct sockaddr *)&address, sizeof address)) die(path);

    uint64_t offered = ask(GET_FEATURES);
    if ((offered & wanted) != wanted || !(ask(GET_PROTOCOL_FEATURES) & PROTOCOL_CONFIG)) errno = EPROTO, die("features");
    tell(SET_PROTOCOL_FEATURES, PROTOCOL_CONFIG, -1);
    tell(SET_OWNER, 0, -1);
    message.config.offset = 0, message.config.size = sizeof message.config.capacity, message.config.flags = 0, message.config.capacity = 0;
    say(&message, GET_CONFIG, sizeof message.config, -1);
    hear(&message);
    sectors = message.config.capacity;
    if (!sectors) die("no capacity");
    tell(SET_FEATURES, wanted, -1);

    uint64_t at = (uintptr_t)shared;
    message.memory.count = 1, message.memory.padding = 0, message.memory.guest = 0, message.memory.size = sizeof *shared;
    message.memory.user = at, message.memory.offset = 0;
    say(&message, SET_MEM_TABLE, sizeof message.memory, memory);
    tell_ring(SET_VRING_NUM, RING);
    tell_ring(SET_VRING_BASE, 0);
    message.rings.index = 0, message.rings.flags = 0, message.rings.log = 0;
    message.rings.descriptors = (uintptr_t)shared->descriptors;
    message.rings.available = (uintptr_t)&shared->available, message.rings.used = (uintptr_t)&shared->used;
    say(&message, SET_VRING_ADDR, sizeof message.rings, -1);
    tell(SET_VRING_KICK, 0, kick_fd);
    tell(SET_VRING_CALL, 0, call_fd);
    tell_ring(SET_VRING_ENABLE, 1);
}

/* --- Requests ------------------------------------------------------------------------------------------------------------------- */

static int is_free(uint64_t first, uint64_t count) {
    return !memchr(busy + first, 1, count);
}

static void choose(int number, const char *flavour) {
    int mixed = strcmp(flavour, "first"), flushes = !strcmp(flavour, "flushes"), kind = WRITE;
    if (mixed) {
        uint64_t side = draw(100);
        kind = flushes && draw(50) == 0 ? FLUSH : side < 60 ? WRITE : side < 70 ? TRIM : side < 80 ? ZERO : READ;
    }
    uint64_t first, count;
    do {
        if (!mixed) {
            count = 8, first = draw(sectors / 8) * 8;
        } else {
            count = draw(4) ? 1 + draw(16) : 1 + draw(kind == TRIM || kind == ZERO ? VOID_SECTORS_MAX : SECTORS_MAX);
            first = draw(sectors - count + 1);
            /* half of them begin and end at a block of 4 KiB, as those of file systems do */
            if (draw(2)) count = (count + 7) / 8 * 8, first = first / 8 * 8;
            if (count > SECTORS_MAX && kind != TRIM && kind != ZERO) count = SECTORS_MAX;
            if (first + count > sectors) first = sectors - count;
        }
        if (kind == FLUSH) first = count = 0;
    } while (!is_free(first, count));
    sent[number].kind = kind, sent[number].first = first, sent[number].count = count;
    memset(busy + first, 1, count);
}

static void send_request(int number) {
    struct slot *slot = &shared->slots[number];
    struct vring_desc *chain = &shared->descriptors[number * HEADS];
    int kind = sent[number].kind;
    uint64_t count = sent[number].count, first = sent[number].first, base = (uintptr_t)shared;
    slot->head = (struct virtio_blk_outhdr){.type = types[kind], .sector = kind == READ || kind == WRITE ? first : 0};
    slot->range = (struct virtio_blk_discard_write_zeroes){first, count, kind == ZERO && draw(2) ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0};
    slot->status = 0xFF;
    if (kind == WRITE) {
        sent[number].stamp = stamp++;
        for (uint64_t word = 0; word < count * WORDS; word++) slot->data[word] = (first + word / WORDS) << 32 | sent[number].stamp;
    }
    int next = number * HEADS + 1;
    chain[0] = (struct vring_desc){(uintptr_t)&slot->head - base, sizeof slot->head, VRING_DESC_F_NEXT, next};
    if (kind == READ || kind == WRITE)
        chain[1] = (struct vring_desc){(uintptr_t)slot->data - base, count * SECTOR,
                                       VRING_DESC_F_NEXT | (kind == READ ? VRING_DESC_F_WRITE : 0), next + 1};
    else if (kind != FLUSH)
        chain[1] = (struct vring_desc){(uintptr_t)&slot->range - base, sizeof slot->range, VRING_DESC_F_NEXT, next + 1};
    else
        chain[0].next = next + 1;
    chain[2] = (struct vring_desc){(uintptr_t)&slot->status - base, 1, VRING_DESC_F_WRITE, 0};
    uint16_t index = shared->available.index;
    shared->available.ring[index % RING] = number * HEADS;
    __atomic_store_n(&shared->available.index, index + 1, __ATOMIC_RELEASE);
}

static void judge(uint64_t sector, const uint64_t *data) {
    uint64_t expected = state[sector] == ZEROS ? 0 : sector << 32 | state[sector];
    int as_expected = 1;
    for (int word = 0; word < WORDS; word++) as_expected = as_expected && data[word] == expected;
    if (as_expected || state[sector] == AS_AT_FIRST) return;    /* what was there at first is not known here */
    fprintf(stderr, "guest: sector %lu begins with %016lx instead of %016lx\n", sector, data[0], expected);
    exit(1);
}

static void take(int number) {
    struct slot *slot = &shared->slots[number];
    uint64_t first = sent[number].first, count = sent[number].count;
    uint64_t whole = (first + trim_sectors - 1) / trim_sectors * trim_sectors, end = (first + count) / trim_sectors * trim_sectors;
    if (slot->status != VIRTIO_BLK_S_OK) {
        fprintf(stderr, "guest: a request of kind %d at sector %lu ended with status %d\n", sent[number].kind, first, slot->status);
        exit(1);
    }
    for (uint64_t sector = first; sector < first + count; sector++) {
        busy[sector] = 0;
        if (sent[number].kind == WRITE) state[sector] = sent[number].stamp;
        else if (sent[number].kind == ZERO) state[sector] = ZEROS;
        else if (sent[number].kind == TRIM && sector >= whole && sector < end) state[sector] = ZEROS;
        else if (sent[number].kind == READ) judge(sector, &slot->data[(sector - first) * WORDS]);
    }
    counts[sent[number].kind]++;
}

static void kick(void) {
    uint64_t one = 1;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&shared->used.flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY) return;
    if (write(kick_fd, &one, sizeof one) != sizeof one) die("kick");
}

static void wait_for_answers(void) {
    struct pollfd polled[2] = {{call_fd, POLLIN, 0}, {channel, POLLIN, 0}};
    uint64_t calls;
    while (__atomic_load_n(&shared->used.index, __ATOMIC_ACQUIRE) == taken) {
        if (poll(polled, 2, 60000) <= 0) errno = ETIMEDOUT, die("no answer");
        if (polled[1].revents) errno = ECONNRESET, die("the device");
        if (read(call_fd, &calls, sizeof calls) < 0 && errno != EAGAIN) die("call");
    }
}

int main(int argc, char **words) {
    if (argc != 7) return 2;
    uint64_t left = strtoull(words[2], NULL, 10), answered = 0;
    rng = strtoull(words[3], NULL, 10) * 0x9E3779B97F4A7C15ull | 1;
    trim_sectors = strtoull(words[5], NULL, 10);
    attach(words[1]);
    state = calloc(sectors, sizeof *state), busy = calloc(sectors, 1);
    if (!state || !busy) die("memory");
    int under_way = DEPTH;
    for (int number = 0; number < DEPTH; number++) choose(number, words[4]), send_request(number);
    kick();
    while (under_way) {
        wait_for_answers();
        int fresh = 0;
        for (uint16_t index = __atomic_load_n(&shared->used.index, __ATOMIC_ACQUIRE); taken != index; taken++) {
            int number = shared->used.ring[taken % RING].id / HEADS;
            take(number);
            if (++answered % PROGRESS == 0) printf("%lu answered\n", answered), fflush(stdout);
            if (left > DEPTH) left--, choose(number, words[4]), send_request(number), fresh++;
            else under_way--;
        }
        if (fresh) kick();
    }
    FILE *file = fopen(words[6], "wb");
    if (!file || fwrite(state, sizeof *state, sectors, file) != sectors || fclose(file)) die(words[6]);
    for (int kind = 0; kind < KINDS; kind++) printf("%s%lu %s", kind ? ", " : "", counts[kind], names[kind]);
    printf("\n");
    return 0;
}
