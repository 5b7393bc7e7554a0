# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of device operations: what an engine asks of a device, and what a device (io_uring, blocking, simulated) answers.

Declarations only. A device owns order: submission, persistence and completion are its business; an engine may assume nothing but
what docs/internals/durability.md says.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef enum OpKind:
    OP_READ = 0
    OP_WRITE = 1
    OP_FLUSH = 2        # every write completed before this began is durable when it completes
    OP_DISCARD = 3      # advisory: contents become undefined
    OP_ZERO = 4         # contents become zeros, without any being sent; -EOPNOTSUPP: not by this device

cdef enum OpTarget:
    TARGET_STORAGE = 0
    TARGET_BASE = 1     # read only

cdef struct DeviceOp:
    uint64_t token          # the engine's; handed back on completion
    uint64_t offset_bytes
    uint64_t length_bytes
    uint8_t *buffer         # aligned as the engine was told; owned by the engine until completion
    uint8_t kind            # OpKind
    uint8_t target          # OpTarget
    uint8_t durable         # a write that is durable when it completes (RWF_DSYNC)
# A completion is (token, result): result is 0 or a negative errno. A device finishes short transfers itself.
