// SPDX-License-Identifier: Apache-2.0
/* What answer.c and many.c both say over NBD: magic numbers, commands, and the heads of requests and simple replies. */

#ifndef WIRE_H
#define WIRE_H

#include <stdint.h>

#define NBDMAGIC 0x4e42444d41474943ULL
#define IHAVEOPT 0x49484156454F5054ULL
#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
#define FLAGS_HANDSHAKE 3   /* fixed newstyle, no zeroes */
enum { OPT_EXPORT_NAME = 1 };
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2 };

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

#endif
