# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Requests in flight on one open disk: hands them to the engine, moves the device one event at a time, and asks the oracle what came of it.

It drives the engine as the serving loops do, through the compiled interface; in play no Python runs per request. It may not know how a
disk is provisioned, recovered or found on its device.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset

from fvd._aligned cimport aligned
from fvd.device.op cimport OP_FLUSH, OP_WRITE, DeviceOp
from fvd.engine._engine cimport (
    DONE_ALL_ZERO, EXTENT_DATA, FLAG_FUA, FLAG_NO_HOLE, REQUEST_CLOSE, REQUEST_FLUSH, REQUEST_READ, REQUEST_TRIM, REQUEST_WRITE,
    REQUEST_ZERO, Changes, Engine, Extent, Request,
)
from fvd.sim._device cimport (
    CATEGORY_DISCARD, CATEGORY_FLUSH, CATEGORY_JOURNAL, CATEGORY_MAP, CATEGORY_READ, CATEGORY_WRITE, CATEGORY_ZERO,
    Operation, SimulatedDevice,
)
from fvd.sim._rng cimport Rng
from fvd.sim._oracle cimport Oracle
from fvd.sim._ring_guest cimport RingGuest

from fvd.modes import UNSAFE_CACHE_MODES, WRITE_THROUGH_CACHE_MODES
from fvd.sim._oracle import Violation

KINDS = ("read", "write", "flush", "trim", "zero", "close", "fua", "rewrite")
READ, WRITE, FLUSH, TRIM, ZERO, CLOSE = REQUEST_READ, REQUEST_WRITE, REQUEST_FLUSH, REQUEST_TRIM, REQUEST_ZERO, REQUEST_CLOSE
NEVER = 1 << 62

cdef enum:
    SECTOR = 512
    PAGE = 4096
    AROUND = 8                  # sectors that a verifying read takes in beside the write's own
    RETRY_NS = 250_000_000
    STARVED_NS = 1_000_000_000
    FOREVER = 5_000_000         # events without which anything must have ended
    BUSY = 10_000               # calls of `attend` at one moment
    FLUSHES_MAX = 2            # a commit's and a checkpoint's
    MAP_WRITES_MAX = 4
    ZEROING_MAX = 32

cdef uint64_t RING_COOKIE = <uint64_t>1 << 63
cdef double RING_SHARE = 0.8        # of the requests that can go through a ring
cdef double TOLD_SHARE = 0.4         # of the turns in which a guest is shown what has ended

cdef int REQUESTS[6]
REQUESTS[:] = [REQUEST_READ, REQUEST_WRITE, REQUEST_FLUSH, REQUEST_TRIM, REQUEST_ZERO, REQUEST_CLOSE]


cdef class Player:

    def __cinit__(self):
        self.guests = NULL

    def __init__(self, Engine engine, SimulatedDevice device, Oracle oracle, Rng rng, *, geometry, base_bytes, cache_mode):
        """See _player.pyi."""
        self.engine = engine
        self.device = device
        self.oracle = oracle
        self.rng = rng
        self.request_rng = Rng(0)
        self.block_sectors = geometry.block_size_bytes // SECTOR
        self.chunk_sectors = geometry.chunk_size_bytes // SECTOR
        self.disk_sectors = geometry.virtual_size_bytes // SECTOR
        self.most_bytes = geometry.max_storage_size_bytes
        self.has_base = base_bytes is not None
        self.trims = base_bytes is None or geometry.table_entries > 0
        self.promises_flush = cache_mode not in UNSAFE_CACHE_MODES
        self.every_write_durable = cache_mode in WRITE_THROUGH_CACHE_MODES
        self.failed_at = self.changes_at_failure = self.due_ns = NEVER
        self.capacity = 64
        self.guests = <Guest *>calloc(self.capacity, sizeof(Guest))
        if self.guests == NULL:
            raise MemoryError("player")
        self.depth = self.least_depth = 1
        self.to_verify = []
        self.holes_active = {}
        self.holes_ended = {}
        self.to_send_again = []
        self.reverted = device.reverted
        oracle.lands_late = device.landing_share > 0

    def __dealloc__(self):
        cdef uint32_t i
        if self.guests != NULL:
            for i in range(self.capacity):
                free(self.guests[i].allocation)
        free(self.guests)

    @property
    def in_flight(self):
        cdef uint32_t i
        return {self.guests[i].cookie: KINDS[self.guests[i].kind] for i in range(self.capacity) if self.guests[i].active}

    # --- requests and events ----------------------------------------------------------------------------------------

    def submit(self, str kind, uint64_t first_sector=0, uint64_t sectors=0, *, bint fua=False, bint no_hole=False, uint64_t skew_bytes=0):
        return self.send(KINDS.index(kind), first_sector, sectors, fua, no_hole, skew_bytes)

    cdef uint64_t send(self, int kind, uint64_t first_sector, uint64_t sectors, bint fua, bint no_hole, uint64_t skew,
                       uint32_t again=0) except 0:
        """`again`: the oracle's number of a write that another life has not answered."""
        cdef uint32_t slot
        cdef Guest *guest
        if kind == KIND_CLOSE and self.to_send_again:
            self.send_some_again(True)
        slot = self.free_place()
        guest = &self.guests[slot]
        memset(guest, 0, sizeof(Guest))
        self.serial += 1
        guest.cookie = self.serial << 20 | slot
        guest.kind = kind
        guest.fua = fua
        guest.no_hole = no_hole
        guest.alone = self.in_flight_count == 0
        guest.first_sector = first_sector
        guest.sectors = sectors
        guest.growable = self.engine.disk.storage_size < self.most_bytes
        if sectors and (kind == KIND_WRITE or kind == KIND_ZERO):
            self.promise(guest)
        if kind == KIND_READ or kind == KIND_WRITE:
            guest.allocation = <uint8_t *>aligned(sectors * SECTOR + skew + 1)
            if guest.allocation == NULL:
                raise MemoryError("player")
            guest.buffer = guest.allocation + skew
        guest.active = 1
        self.in_flight_count += 1
        self.reads_in_flight += kind == KIND_READ
        self.tell_oracle(guest, again)
        if guest.write:
            guest.began = self.oracle.tick_() if again else self.oracle.clock
        if kind == KIND_TRIM or kind == KIND_ZERO:
            self.hole_began(guest)
        if self.log is not None:
            where = f" {first_sector}+{sectors}" if sectors else ""
            self.log.append(f"submit {guest.cookie >> 20}: {KINDS[kind]}{where}{' fua' if fua else ''}{' no-hole' if no_hole else ''}")
        if self.ring is not None and self.ring.fits(kind, sectors, fua) and self.ring.rng.chance(RING_SHARE):
            guest.by_ring = 1
            guest.promised = 0              # its parts ask for slots one by one
            self.ring.put(kind, first_sector, sectors, no_hole, guest.buffer, slot)
            return guest.cookie
        self.engine.submit(REQUESTS[kind], (FLAG_FUA if fua else 0) | (FLAG_NO_HOLE if no_hole else 0), first_sector * SECTOR,
                           sectors * SECTOR, guest.buffer, guest.cookie)
        return self.guests[slot].cookie

    cdef uint32_t free_place(self) except? 0xFFFFFFFF:
        """Where a request can be remembered: after the last one that was, or from the start again; there are more when all are taken."""
        cdef uint32_t slot = self.free_hint
        while slot < self.capacity and self.guests[slot].active:
            slot += 1
        if slot == self.capacity:
            slot = 0
            while slot < self.capacity and self.guests[slot].active:
                slot += 1
        if slot == self.capacity:
            self.guests = <Guest *>realloc(self.guests, self.capacity * 2 * sizeof(Guest))
            if self.guests == NULL:
                raise MemoryError("player")
            memset(self.guests + self.capacity, 0, self.capacity * sizeof(Guest))
            self.capacity *= 2
        self.free_hint = slot + 1
        return slot

    cdef int promise(self, Guest *guest) except -1:
        """Of a write: whether the storage that is there must do for it, by what those under way may still take."""
        cdef uint64_t end = guest.first_sector + guest.sectors
        guest.chunks = <uint32_t>((end - 1) // self.chunk_sectors - guest.first_sector // self.chunk_sectors + 1)
        # One that asks for slots bit by bit (R34) may find that a later one has been quicker.
        guest.promised = guest.chunks <= self.reserve_left and (guest.chunks == 1 or 2 * guest.chunks <= self.engine.mode.window)
        # One that the reserve had no slot for may be quicker than those before it: they may wait for memory before they take a slot.
        if guest.chunks > self.reserve_left:
            self.promises_end()
        self.promises |= guest.promised
        self.reserve_left -= min(self.reserve_left, <uint64_t>guest.chunks)
        self.chunks_in_flight += guest.chunks
        return 0

    cdef int tell_oracle(self, Guest *guest, uint32_t again) except -1:
        """What the request may read or change from now on. `again`: see `send`."""
        cdef uint64_t low, high, unit
        if guest.kind == KIND_READ:
            memset(guest.buffer, 0xEE, guest.sectors * SECTOR)
            guest.began = self.oracle.read_begun()
        elif again:
            guest.write = again
            if guest.kind == KIND_WRITE:
                self.oracle.fill(again, guest.first_sector, guest.sectors, guest.buffer)
        elif guest.kind == KIND_WRITE:
            guest.write = self.oracle.begin(guest.first_sector, guest.sectors, False, False)
            self.oracle.fill(guest.write, guest.first_sector, guest.sectors, guest.buffer)
        elif guest.kind == KIND_ZERO:
            guest.write = self.oracle.begin(guest.first_sector, guest.sectors, True, False)
        elif guest.kind == KIND_TRIM:
            # Whole blocks, over a base whole chunks (the last one though it is short), are promised to read as zeros; the rest keeps
            # its data.
            unit = self.chunk_sectors if self.has_base else self.block_sectors
            low = (guest.first_sector + unit - 1) // unit * unit
            high = guest.first_sector + guest.sectors
            if high < self.disk_sectors:
                high = high // unit * unit
            if self.trims and low < high:
                guest.write = self.oracle.begin(low, high - low, True, False)
            else:
                guest.write = self.oracle.begin(guest.first_sector, guest.sectors, True, True)
        elif guest.kind == KIND_FLUSH:
            guest.began = self.oracle.flush_begun()
        else:
            self.cancelled = True   # a close ends the writes that wait for space
        return 0

    cdef int pump(self) except -1:
        """Take what the engine wants done, and what it has done."""
        cdef uint32_t i
        cdef uint64_t cookie
        cdef int32_t error
        cdef uint32_t flags
        cdef DeviceOp op
        cdef Operation added
        cdef uint32_t turns = 0
        cdef bint attending = True
        while self.to_verify:
            first, sectors = self.to_verify.pop()
            self.send(KIND_READ, first, sectors, False, False, 0)
        if self.to_send_again:
            self.send_some_again(False)
        if self.ring is not None:
            self.ring.take()
        self.engine.tick(self.device.now_ns)
        while attending:
            if self.stopped and self.engine.op_count:
                raise Violation(f"{self.engine.op_count} operations for a disk that was stopped")
            for i in range(self.engine.op_count):
                op = self.engine.ops[i]
                added = self.device.add(op.token, op.kind, op.target, op.offset_bytes, op.length_bytes, op.buffer, op.durable)
                if self.log is not None:
                    self.log.append(f"  device gets {added!r}")
                if self.failed_at != NEVER and added.kind == OP_WRITE and self.device.category_of(added) != CATEGORY_WRITE:
                    raise Violation(f"metadata is written after a flush or a metadata write had failed: {added}")
                if op.kind >= OP_FLUSH or op.offset_bytes < self.device.data_start:
                    self.check_bounds(added)
            self.engine.op_count = 0
            i = 0
            while i < self.engine.done_count:
                cookie, error, flags = self.engine.done[i].cookie, self.engine.done[i].error, self.engine.done[i].flags
                i += 1
                if cookie & RING_COOKIE:
                    self.ring.ring.part_ended(<uint32_t>cookie, error)
                else:
                    self.finished(cookie, error, flags)
            self.engine.done_count = 0
            if self.ring is not None:
                self.take_answers(False)
            # One thing at a time: what comes of it is judged before the next.
            attending = self.attend is not None and (self.engine.want & self.attended or self.device.now_ns >= self.due_ns)
            if attending:
                self.attend()
                turns += 1
                if turns > BUSY:
                    raise Violation("whoever attends to the engine is called again and again, and nothing comes of it")
        self.check_waiting()
        return self.pump() if self.to_verify else 0

    cdef int check_waiting(self) except -1:
        """Who waits for a slot does so because there is none, and not because copies have taken what was the guest's."""
        cdef Request *r = self.engine.waiting.slot.head
        cdef uint64_t reserve = self.engine.slots.reserve
        cdef uint64_t free_slots = self.engine.slots.free_count + self.engine.discards.waiting_count
        cdef Guest *guest
        if r != NULL:
            if free_slots:
                raise Violation(f"writes wait for a slot though {free_slots} are free")
            if reserve and self.engine.count.waited_for_space != self.waited:
                self.waited = self.engine.count.waited_for_space
                while r != NULL:
                    guest = &self.guests[r.cookie & 0xFFFFF]
                    if guest.promised and not r.cookie & RING_COOKIE:
                        raise Violation(f"request {r.cookie >> 20} waits for a slot that copies were to leave to the guest")
                    r = r.next
        if self.engine.slots.capacity >= self.engine.disk.chunks:
            self.reserve_left = 0       # each chunk has its own
        elif free_slots >= reserve and reserve > self.chunks_in_flight:
            # Those under way may take theirs yet.
            self.reserve_left = max(self.reserve_left, reserve - self.chunks_in_flight)
        return 0

    cdef void promises_end(self) noexcept nogil:
        cdef uint32_t i
        if self.promises:
            for i in range(self.capacity):
                self.guests[i].promised = 0
        self.promises = False

    cdef int take_answers(self, bint at_once) except -1:
        """What the guest finds in its ring: in most turns, or `at_once`. Returns how many answers."""
        cdef int place, status, count = 0
        cdef int32_t error
        cdef Guest *guest
        if not at_once and not self.ring.rng.chance(TOLD_SHARE):
            return 0
        self.ring.ring.publish()
        place = self.ring.next_answer()
        while place >= 0:
            guest = &self.guests[self.ring.places[place].slot]
            error = self.ring.error_of(place)
            status = self.ring.fetch(place, guest.buffer)
            if (status != 0) != (error != 0):
                raise Violation(f"{KINDS[guest.kind]} at sector {guest.first_sector} ended with {error}, and the guest was told {status}")
            count += 1
            self.finished(guest.cookie, error, 0)
            place = self.ring.next_answer()
        return count

    def show_answers(self):
        if self.ring is not None:
            self.take_answers(True)

    def use_ring(self, RingGuest ring not None):
        self.ring = ring
        ring.attach(self.engine)

    def in_ring(self):
        cdef uint32_t i
        cdef Guest *guest
        requests = {}
        if self.ring is not None:
            for place, i in self.ring.unanswered().items():
                guest = &self.guests[i]
                requests[place] = (guest.kind, guest.first_sector, guest.sectors, bool(guest.no_hole), guest.write)
        return requests

    def take_up_ring(self, RingGuest ring not None, requests):
        cdef uint32_t slot
        cdef int place
        cdef Guest *guest
        for place, (kind, first_sector, sectors, no_hole, write) in requests.items():
            slot = self.free_place()
            guest = &self.guests[slot]
            memset(guest, 0, sizeof(Guest))
            self.serial += 1
            guest.cookie = self.serial << 20 | slot
            guest.kind, guest.first_sector, guest.sectors, guest.no_hole = kind, first_sector, sectors, no_hole
            guest.growable = self.engine.disk.storage_size < self.most_bytes
            guest.by_ring = guest.active = 1
            guest.allocation = guest.buffer = <uint8_t *>aligned(sectors * SECTOR + 1)
            if guest.allocation == NULL:
                raise MemoryError("player")
            self.in_flight_count += 1
            self.reads_in_flight += kind == KIND_READ
            self.tell_oracle(guest, write)
            if guest.write:
                guest.began = self.oracle.tick_()
            if kind == KIND_TRIM or kind == KIND_ZERO:
                self.hole_began(guest)
            ring.rename(place, slot)
        self.take_old_answers(ring)
        self.use_ring(ring)

    cdef int take_old_answers(self, RingGuest ring) except -1:
        """What the server that died has shown before: of a read nobody knows any more what it may show."""
        cdef int place = ring.next_answer(), status
        cdef Guest *guest
        while place >= 0:
            guest = &self.guests[ring.places[place].slot]
            status = ring.fetch(place, guest.buffer)
            if guest.kind == KIND_TRIM or guest.kind == KIND_ZERO:
                self.hole_ended(guest)
            if guest.kind == KIND_READ:
                self.oracle.read_dropped(guest.began)
            elif guest.kind == KIND_FLUSH:
                if self.promises_flush:
                    self.oracle.flush_ended(guest.began, False)
            else:
                self.oracle.end(guest.write, status == 0, self.every_write_durable and status == 0)
            self.forget(guest)
            place = ring.next_answer()
        return 0

    def unanswered(self):
        cdef uint32_t i
        cdef Guest *guest
        requests = list(self.to_send_again)
        for i in range(self.capacity):
            guest = &self.guests[i]
            if guest.active and guest.kind != KIND_CLOSE and not guest.by_ring:
                requests.append((guest.kind, guest.first_sector, guest.sectors, bool(guest.fua), bool(guest.no_hole), guest.write))
        return requests

    def send_again(self, requests):
        self.to_send_again = list(requests)

    cdef int send_some_again(self, bint every) except -1:
        """In any order, mixed with new ones."""
        while self.to_send_again and (every or not self.device.pending or self.rng.chance(0.3)):
            kind, first, sectors, fua, no_hole, write = self.to_send_again.pop(self.rng.below(len(self.to_send_again)))
            self.send(kind, first, sectors, fua, no_hole, 0, write)
        return 0

    def exchange(self):
        self.pump()

    def step(self):
        return self.turn()

    cdef bint turn(self) except -1:
        cdef Operation op
        self.pump()
        if not self.device.pending and (self.engine.base.retries != NULL or self.engine.starved.first != NULL):
            # Nothing else is to happen before the next attempt.
            self.device.advance(RETRY_NS if self.engine.base.retries != NULL else STARVED_NS)
            self.pump()
        while not self.device.pending and self.ring is not None and self.take_answers(True):
            self.pump()         # what the guest asks when it sees them may be answered at once
        if not self.device.pending:
            return False
        if self.in_flight_count:
            self.check_progress()
        op = self.device.event()
        if self.device.reverted != self.reverted:
            self.reverted = self.device.reverted
            self.doubts = True
            self.oracle.doubt()
        self.take(op)
        return True

    cdef int check_bounds(self, Operation op) except -1:
        """However much there is to do behind the guests' requests, only so much of it is handed to the device at once."""
        cdef int category = self.device.category_of(op)
        cdef uint64_t count = self.device.under_way[category]
        cdef uint64_t most = NEVER
        if category == CATEGORY_FLUSH:
            most = FLUSHES_MAX
        elif category == CATEGORY_JOURNAL:
            most = 1
        elif category == CATEGORY_MAP:
            most = MAP_WRITES_MAX
        elif category == CATEGORY_ZERO:
            most = ZEROING_MAX
        elif category == CATEGORY_DISCARD and self.discards_max:
            most = self.discards_max
            if op.length_bytes > max(self.discard_bytes, self.chunk_sectors * SECTOR):
                raise Violation(f"{op} is longer than {self.discard_bytes} bytes and a chunk")
        if count > most:
            raise Violation(f"{count} operations of one kind in the device, like {op}; {most} are allowed")
        return 0

    cdef int check_progress(self) except -1:
        """What requests may wait for: reads for reads alone; and for discards only writes that have no other slot."""
        cdef Request *r
        cdef uint32_t waiting = 0
        cdef uint64_t discards
        if self.engine.base.retries != NULL or self.engine.close.request != NULL or self.engine.starved.count:
            return 0
        if self.ring is not None and self.ring.ring.next_used != self.ring.ring.published:
            return 0            # some have ended, and the guest has not been shown
        if self.reads_in_flight and not self.has_base and self.device.under_way[<int>CATEGORY_READ] == 0:
            raise Violation(f"{self.reads_in_flight} reads wait for something else than reads: {self.device.pending[:4]}")
        discards = self.device.under_way[<int>CATEGORY_DISCARD]
        if discards and discards == <uint64_t>len(self.device.pending):
            r = self.engine.waiting.slot.head
            while r != NULL:
                waiting += 1
                r = r.next
            if waiting != self.in_flight_count and (self.ring is None or waiting < self.in_flight_count):     # in parts, perhaps
                raise Violation(f"{self.in_flight_count - waiting} requests wait for discards: {self.device.pending[:4]}")
            if waiting and self.engine.free_slots:
                raise Violation(f"{waiting} writes wait for discards though slots are free")
        return 0

    def deliver(self, Operation operation):
        self.take(operation)

    cdef int take(self, Operation op) except -1:
        cdef int category
        cdef uint64_t changes
        cdef Changes *sets
        if op is not None:
            if self.log is not None:
                self.log.append(f"  device completes {op!r}")
            if op.result:
                category = self.device.category_of(op)
                if category == CATEGORY_FLUSH or category == CATEGORY_JOURNAL or category == CATEGORY_MAP or op.took_report or op.durable:
                    # From the first flush, durable write or metadata write that failed no flush may succeed.
                    self.failed_at = min(self.failed_at, self.oracle.tick_())
            self.engine.complete(op.token, op.result)
            if self.failed_at != NEVER:
                # What was copied may become the guest's, by a write to it; that makes no more of them.
                sets = &self.engine.changes
                changes = sets.running.words + sets.running.entries + sets.lazy.words + sets.lazy.entries
                if self.changes_at_failure == NEVER:
                    self.changes_at_failure = changes
                elif changes > self.changes_at_failure:
                    raise Violation("a change that can never be committed became pending after a flush or metadata write had failed")
        return self.pump()

    cdef int forget(self, Guest *guest) except -1:
        free(guest.allocation)
        guest.allocation = NULL
        guest.active = 0
        self.in_flight_count -= 1
        self.chunks_in_flight -= guest.chunks
        self.reads_in_flight -= guest.kind == KIND_READ
        return 0

    cdef int finished(self, uint64_t cookie, int32_t error, uint32_t flags) except -1:
        cdef uint32_t slot = cookie & 0xFFFFF
        cdef Guest *guest
        cdef bint expected, durable
        if slot >= self.capacity or not self.guests[slot].active or self.guests[slot].cookie != cookie:
            raise Violation(f"request {cookie >> 20} ended twice, or was never submitted")
        guest = &self.guests[slot]
        self.free_hint = min(self.free_hint, slot)
        self.requests_done += 1
        if self.log is not None:
            self.log.append(f"done {cookie >> 20}: {KINDS[guest.kind]} {error}")
        expected = (
            error == 0
            or (error == -108 and self.cancelled)
            or (error == -28 and (self.exhausted or cookie >> 20 <= self.exhausted_until) and guest.growable)
            or (self.errors_expected and (error == -5 or error == self.device.fail_with))
            or (self.stopped and error == -5)
        )
        if self.stopped and error == 0 and guest.kind != KIND_CLOSE:
            raise Violation(f"{KINDS[guest.kind]} at sector {guest.first_sector} of a disk that was stopped is answered")
        if not expected:
            raise Violation(f"{KINDS[guest.kind]} at sector {guest.first_sector} failed with {error}")
        if error == -28 and guest.promised and not self.errors_expected:
            raise Violation(f"{KINDS[guest.kind]} at sector {guest.first_sector} finds no slot though copies were to leave it one")
        if guest.kind == KIND_TRIM or guest.kind == KIND_ZERO:
            self.hole_ended(guest)
        if guest.kind == KIND_READ:
            if error == 0:
                # A server sends nothing but the length of such a read.
                if flags & DONE_ALL_ZERO and guest.sectors and (
                        guest.buffer[0] or memcmp(guest.buffer, guest.buffer + 1, guest.sectors * SECTOR - 1)):
                    raise Violation(f"a read at sector {guest.first_sector} said that it shows zeros, and shows something else")
                # What storage lost and no longer shows it may have held before it was this disk's, until the engine has been told.
                if self.doubts and guest.began < self.failed_at:
                    self.oracle.loose_sectors = self.disk_sectors if self.has_base else self.chunk_sectors
                    self.oracle.loose_copies = self.has_base
                self.oracle.read_ended(guest.first_sector, guest.sectors, guest.began, guest.buffer)
                self.oracle.loose_sectors = 0
            else:
                self.oracle.read_dropped(guest.began)
        elif guest.kind == KIND_FLUSH:
            if self.promises_flush:
                if error == 0 and guest.began > self.failed_at:
                    raise Violation("a flush succeeded after the device had failed one")
                self.oracle.flush_ended(guest.began, error == 0)
        elif guest.kind == KIND_CLOSE:
            if self.engine.inflight_ops or self.engine.open_requests:
                raise Violation("the disk is closed with operations or requests under way")
        else:
            durable = self.every_write_durable or (guest.fua and self.promises_flush)
            if durable and error == 0 and guest.began > self.failed_at:
                raise Violation("a durable write succeeded after a flush or metadata write had failed")
            if guest.no_hole and error == 0 and guest.alone and cookie >> 20 == self.serial:
                self.check_allocated(guest)
            if durable and error == 0 and guest.kind == KIND_WRITE and self.mapped is not None and self.no_hole_beside(guest):
                self.mapped(guest.first_sector, guest.sectors)
            self.oracle.end(guest.write, error == 0, durable)
            if guest.kind == KIND_WRITE and error == 0 and self.verify_share and self.rng.chance(self.verify_share):
                self.verify(guest)
        return self.forget(guest)

    cdef int check_allocated(self, Guest *guest) except -1:
        """Zeros that were to be no hole are written; nothing else was under way that could have made one."""
        cdef Extent extents[64]
        cdef int i
        for i in range(self.engine.extents(guest.first_sector * SECTOR, guest.sectors * SECTOR, extents, 64)):
            if extents[i].state != EXTENT_DATA:
                raise Violation(f"write-zeroes at sector {guest.first_sector} left a hole that it was not to leave")
        return 0

    cdef int hole_began(self, Guest *guest) except -1:
        for chunk in range(guest.first_sector // self.chunk_sectors, (guest.first_sector + guest.sectors) // self.chunk_sectors + 1):
            self.holes_active[chunk] = self.holes_active.get(chunk, 0) + 1
        return 0

    cdef int hole_ended(self, Guest *guest) except -1:
        for chunk in range(guest.first_sector // self.chunk_sectors, (guest.first_sector + guest.sectors) // self.chunk_sectors + 1):
            self.holes_active[chunk] -= 1
            self.holes_ended[chunk] = self.oracle.clock
        return 0

    cdef bint no_hole_beside(self, Guest *guest) except -1:
        """Whether no trim or write-zeroes was in flight in the chunks of a write while it was: then its blocks are mapped since."""
        for chunk in range(guest.first_sector // self.chunk_sectors, (guest.first_sector + guest.sectors) // self.chunk_sectors + 1):
            if self.holes_active.get(chunk, 0) or self.holes_ended.get(chunk, 0) >= guest.began:
                return False
        return True

    cdef int verify(self, Guest *guest) except -1:
        """A guest that looks at once what it has written, and what lies around it."""
        cdef uint32_t i
        cdef uint64_t first, end
        for i in range(self.area_count):
            first, end = self.areas[2 * i], self.areas[2 * i] + self.areas[2 * i + 1]
            if first <= guest.first_sector < end:
                first = max(first, guest.first_sector - min(guest.first_sector, <uint64_t>AROUND))
                end = min(end, guest.first_sector + guest.sectors + AROUND)
                self.to_verify.append((first, end - first))
        return 0

    def end_exhaustion(self):
        if self.exhausted:
            self.exhausted = False
            self.exhausted_until = self.serial

    def abandon(self):
        cdef uint32_t i
        self.to_verify = []
        self.to_send_again = []
        for i in range(self.capacity):
            if self.guests[i].active:
                self.forget(&self.guests[i])

    def drain(self):
        cdef uint64_t count = 0
        while self.turn():
            count += 1
            if count > FOREVER:
                raise Violation(f"the device is never idle: {self.device.pending[:4]}")

    def read_now(self, uint64_t first_sector, uint64_t sectors):
        cdef Operation op
        cdef uint64_t count = 0
        cdef bint copying = self.engine.copies.on_read
        cdef uint32_t slots = self.engine.prefetch.depth
        data = bytearray(sectors * SECTOR)
        cdef uint8_t *buffer = <uint8_t *>aligned(sectors * SECTOR)
        if buffer == NULL:
            raise MemoryError("player")
        self.engine.copies.on_read = False
        self.engine.prefetch.depth = 0
        try:
            memset(buffer, 0xEE, sectors * SECTOR)
            self.engine.submit(REQUEST_READ, 0, first_sector * SECTOR, sectors * SECTOR, buffer, 0)
            while True:
                for i in range(self.engine.op_count):
                    taken = self.engine.ops[i]
                    self.device.add(taken.token, taken.kind, taken.target, taken.offset_bytes, taken.length_bytes, taken.buffer,
                                    taken.durable)
                self.engine.op_count = 0
                if self.engine.done_count:
                    break
                count += 1
                if not self.device.pending or count > FOREVER:
                    raise Violation("a read of a disk at rest never ends")
                op = self.device.event()
                if op is not None:
                    self.engine.complete(op.token, op.result)
            error = self.engine.done[0].error
            self.engine.done_count = 0
            if error:
                raise Violation(f"a read of a disk at rest failed with {error}")
            memcpy(<char *>data, buffer, sectors * SECTOR)
        finally:
            free(buffer)
            self.engine.copies.on_read = copying
            self.engine.prefetch.depth = slots
        return data

    # --- random play --------------------------------------------------------------------------------------------------

    def aim(self, *, weights, areas, uint64_t largest_sectors, uint32_t depth, uint64_t unit_sectors, double skew_share, double side_share,
            uint32_t least_depth=1, double verify_share=0.0):
        cdef int i
        self.weight_sum = 0
        for i, name in enumerate(KINDS):
            self.weights[i] = weights.get(name, 0.0)
            self.weight_sum += self.weights[i]
        if not 0 < len(areas) <= 8 or self.weight_sum <= 0:
            raise ValueError("between one and eight areas and at least one kind of request are needed")
        self.area_count = len(areas)
        for i, (first, count) in enumerate(areas):
            self.areas[2 * i], self.areas[2 * i + 1] = first, count
        self.largest_sectors = largest_sectors
        self.depth = depth
        self.least_depth = min(least_depth, depth)
        self.unit_sectors = unit_sectors
        self.skew_share = skew_share
        self.verify_share = verify_share
        self.side_share = side_share

    def play(self, uint64_t requests, *, uint64_t seed, uint64_t stream, skip=None, on_side=None, awaited=None):
        cdef uint64_t i, sent = 0
        cdef uint32_t target
        cdef int wanted = -1 if awaited is None else awaited
        cdef Operation op
        for i in range(requests):
            if wanted >= 0:
                for op in self.device.pending:
                    if op.took_effect and self.device.category_of(op) == wanted:
                        return sent
            if skip is not None and i in skip:
                continue
            # Each request has rng of its own: leaving one out changes no other.
            self.request_rng.seed(seed, stream, i)
            self.random_request()
            sent += 1
            if on_side is not None and self.request_rng.chance(self.side_share):
                on_side(self.request_rng)
            target = <uint32_t>self.request_rng.between(self.least_depth, self.depth)
            while self.in_flight_count >= target:
                if not self.turn():
                    break
        return sent

    cdef int random_request(self) except -1:
        cdef Rng rng = self.request_rng
        cdef double pick = self.weight_sum * <double>(rng.raw() >> 11) * (1.0 / 9007199254740992.0)
        cdef int kind = 0
        cdef uint64_t first, total, sectors, at, skew = 0, per, end, unit
        cdef uint32_t area = <uint32_t>rng.below(self.area_count)
        cdef bint fua
        while kind < KIND_COUNT - 1 and (pick >= self.weights[kind] or self.weights[kind] == 0):
            pick -= self.weights[kind]
            kind += 1
        first, total = self.areas[2 * area], self.areas[2 * area + 1]
        unit = self.unit_sectors if rng.chance(0.6) else 1
        sectors = min(rng.between(1, self.largest_sectors), total)
        at = rng.between(0, total - sectors)
        if kind == KIND_REWRITE:
            at = rng.between(0, min(total - 1, <uint64_t>64))
            sectors = min(min(sectors, <uint64_t>16), total - at)
        elif (kind == KIND_TRIM or kind == KIND_ZERO) and rng.chance(0.6):
            per = self.block_sectors if rng.chance(0.5) else self.chunk_sectors
            # Whole blocks and chunks are those of the disk; of an area that begins inside one, what is left of it.
            # Now and then most of the disk.
            end = (first + at) // per * per + per * (rng.between(1, 3) if not rng.chance(0.03) else rng.between(1, total // per + 1))
            at = (first + at) // per * per
            at = at - first if at > first else 0
            end = min(end - first, total) if end > first else total
            sectors = end - at
        if unit > 1:
            at = at // unit * unit
            sectors = max(min(sectors // unit * unit if sectors >= unit else unit, total - at), <uint64_t>1)
        fua = kind == KIND_FUA or ((kind == KIND_TRIM or kind == KIND_ZERO or kind == KIND_WRITE) and rng.chance(0.1))
        if rng.chance(self.skew_share):
            skew = (1, 8, 512)[rng.below(3)]
        if kind == KIND_FUA or kind == KIND_REWRITE:
            kind = KIND_WRITE
        if kind == KIND_FLUSH:
            first = at = sectors = 0
        self.send(kind, first + at, sectors, fua, kind == KIND_ZERO and rng.chance(0.3), skew)
        return 0
