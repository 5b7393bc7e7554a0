# SPDX-License-Identifier: Apache-2.0
"""Guest memory: maps what a front end hands over, translates its addresses, and survives that it is taken away.

The front end may shrink the file at any time, and a load or store beyond its end is SIGBUS. The handler here puts zeros of our own in
place of the whole mapping and remembers that; whoever uses the memory asks `is_torn` after each round, and ends that front end. It knows
neither messages nor rings.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fvd.errors import InvalidArgument, OutOfMemory

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <linux/magic.h>
    #include <signal.h>
    #include <stdint.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/vfs.h>

    #define FVD_WATCHED_MAX 4096
    #define FVD_WATCHED_BYTES_MAX (1ull << 46)  /* half of the addresses there are: nobody may leave none for others */

    /* The handler reads this in whatever thread stumbles, so a range is there before anybody can touch it and until nobody can. */
    static struct { uintptr_t begin, end; int torn; } fvd_watched[FVD_WATCHED_MAX];
    static struct sigaction fvd_other_bus;
    static int fvd_bus_handled;

    static void fvd_on_bus(int number, siginfo_t *info, void *context) {
        uintptr_t at = (uintptr_t)info->si_addr;
        for (int i = 0; i < FVD_WATCHED_MAX; i++) {
            uintptr_t begin = __atomic_load_n(&fvd_watched[i].begin, __ATOMIC_ACQUIRE), end = fvd_watched[i].end;
            if (begin == 0 || at < begin || at >= end)
                continue;
            if (mmap((void *)begin, end - begin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0)
                != MAP_FAILED) {
                __atomic_store_n(&fvd_watched[i].torn, 1, __ATOMIC_RELEASE);
                return;
            }
        }
        if (fvd_other_bus.sa_flags & SA_SIGINFO) {
            fvd_other_bus.sa_sigaction(number, info, context);
        } else if (fvd_other_bus.sa_handler == SIG_DFL || fvd_other_bus.sa_handler == SIG_IGN) {
            signal(SIGBUS, SIG_DFL);    /* the access is tried again, and ends the process as it would have */
        } else {
            fvd_other_bus.sa_handler(number);
        }
    }

    static int fvd_handle_bus(void) {
        struct sigaction action = {.sa_sigaction = fvd_on_bus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        if (fvd_bus_handled)
            return 0;
        sigemptyset(&action.sa_mask);
        if (sigaction(SIGBUS, &action, &fvd_other_bus) != 0)
            return -1;
        fvd_bus_handled = 1;
        return 0;
    }

    static int64_t fvd_watch(uintptr_t begin, uintptr_t end) {
        uint64_t all_bytes = end - begin;
        int64_t number = -1;
        for (int i = 0; i < FVD_WATCHED_MAX; i++)
            if (fvd_watched[i].begin == 0)
                number = i;
            else
                all_bytes += fvd_watched[i].end - fvd_watched[i].begin;
        if (number < 0 || all_bytes > FVD_WATCHED_BYTES_MAX)
            return -1;
        fvd_watched[number].torn = 0;
        fvd_watched[number].end = end;
        __atomic_store_n(&fvd_watched[number].begin, begin, __ATOMIC_RELEASE);
        return number;
    }
    static void fvd_unwatch(uint32_t number) { __atomic_store_n(&fvd_watched[number].begin, 0, __ATOMIC_RELEASE); }
    static int fvd_torn(uint32_t number) { return __atomic_load_n(&fvd_watched[number].torn, __ATOMIC_ACQUIRE); }

    /* The size of its pages if it lives in memory only (memfd, tmpfs, hugetlbfs), else 0: those of other files may be long in coming. */
    static uint64_t fvd_memory_page_bytes(int fd, uint64_t *size_bytes) {
        struct stat status;
        struct statfs system;
        if (fstat(fd, &status) != 0 || fstatfs(fd, &system) != 0 || !S_ISREG(status.st_mode) || status.st_size < 0)
            return 0;
        *size_bytes = (uint64_t)status.st_size;
        if (system.f_type == TMPFS_MAGIC)
            return 4096;
        return system.f_type == HUGETLBFS_MAGIC ? (uint64_t)system.f_bsize : 0;
    }
    static uint8_t *fvd_map_memory(int fd, uint64_t size_bytes) {
        void *memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
        if (memory == MAP_FAILED)
            return NULL;
        madvise(memory, size_bytes, MADV_DONTFORK);
        madvise(memory, size_bytes, MADV_DONTDUMP);
        return (uint8_t *)memory;
    }
    static void fvd_set_bits(uint8_t *log, uint64_t first, uint64_t last) {
        for (uint64_t page = first; page <= last; page++)
            __atomic_fetch_or(&log[page / 8], (uint8_t)(1u << page % 8), __ATOMIC_RELAXED);
    }
    """
    int fvd_handle_bus() noexcept
    int64_t fvd_watch(size_t begin, size_t end) noexcept nogil
    void fvd_unwatch(uint32_t number) noexcept nogil
    int fvd_torn(uint32_t number) noexcept nogil
    uint64_t fvd_memory_page_bytes(int fd, uint64_t *size_bytes) noexcept nogil
    uint8_t *fvd_map_memory(int fd, uint64_t size_bytes) noexcept nogil
    void fvd_set_bits(uint8_t *log, uint64_t first, uint64_t last) noexcept nogil
    int munmap(void *memory, size_t size_bytes) noexcept nogil

cdef enum:
    LOG_PAGE_BYTES = 4096       # of a bit in the log of a migration, whatever the pages are

cdef uint64_t ADDRESS_MAX = <uint64_t>1 << 62


cdef class Shared:
    def __init__(self, int fd, used_bytes):
        """Of the file, so many bytes are used. Raises InvalidArgument (not memory, shorter than that), OutOfMemory."""
        cdef uint64_t file_bytes = 0, page_bytes = fvd_memory_page_bytes(fd, &file_bytes)
        cdef int64_t number
        if page_bytes == 0:
            raise InvalidArgument("memory must be a memfd, or a file of tmpfs or hugetlbfs")
        if not 0 < used_bytes <= min(file_bytes, ADDRESS_MAX):
            raise InvalidArgument(f"{used_bytes} bytes of memory were named, and its file has {file_bytes}")
        if fvd_handle_bus() != 0:
            raise OutOfMemory("the signal of memory that goes away cannot be handled")
        self.size_bytes = (<uint64_t>used_bytes + page_bytes - 1) // page_bytes * page_bytes
        self.memory = fvd_map_memory(fd, self.size_bytes)
        if self.memory == NULL:
            self.size_bytes = 0
            raise OutOfMemory(f"{used_bytes} bytes of shared memory cannot be mapped")
        number = fvd_watch(<size_t>self.memory, <size_t>self.memory + self.size_bytes)
        if number < 0:
            self.unmap()
            raise OutOfMemory("too much of guests' memory is mapped, or in too many pieces")
        self.watched = <uint32_t>number

    cdef void unmap(self) noexcept:
        munmap(self.memory, self.size_bytes)
        self.memory = NULL

    cdef bint is_torn(self) noexcept nogil:
        return fvd_torn(self.watched) != 0

    def __dealloc__(self):
        if self.memory != NULL:
            fvd_unwatch(self.watched)
            self.unmap()


cdef class GuestMemory:
    """The table of a guest's memory: at most REGIONS_MAX regions. What has requests under way in it must not be removed or closed."""

    def __init__(self):
        self.mapped = []

    def add(self, int fd, guest_address, user_address, size_bytes, file_offset_bytes):
        """Maps a region; the descriptor stays the caller's. Raises InvalidArgument (no memory, overlap, too many), OutOfMemory."""
        cdef Region *region
        cdef Shared shared
        if not 0 < size_bytes <= ADDRESS_MAX or max(guest_address, user_address, file_offset_bytes) > 2**64 - 1 - size_bytes:
            raise InvalidArgument(f"a region of {size_bytes} bytes at {guest_address:#x} is no memory")
        if file_offset_bytes + size_bytes > ADDRESS_MAX:
            raise InvalidArgument(f"a region of {size_bytes} bytes at {file_offset_bytes:#x} of its file is no memory")
        if self.count == REGIONS_MAX:
            raise InvalidArgument(f"more than {REGIONS_MAX} regions of memory")
        for i in range(self.count):
            for mine, theirs in ((self.regions[i].guest_address, guest_address), (self.regions[i].user_address, user_address)):
                if mine < theirs + size_bytes and theirs < mine + self.regions[i].size_bytes:
                    raise InvalidArgument(f"two regions of memory overlap, at {theirs:#x} and {mine:#x}")
        shared = Shared(fd, file_offset_bytes + size_bytes)
        region = &self.regions[self.count]
        region.guest_address = guest_address
        region.user_address = user_address
        region.size_bytes = size_bytes
        region.watched = shared.watched
        region.host = shared.memory + <uint64_t>file_offset_bytes
        self.mapped.append(shared)
        self.count += 1

    def remove(self, guest_address, user_address, size_bytes):
        """Unmaps the region that was added so. Nothing may be under way in it. Raises InvalidArgument: there is none."""
        cdef uint32_t i
        cdef Region *region
        for i in range(self.count):
            region = &self.regions[i]
            if (region.guest_address, region.user_address, region.size_bytes) == (guest_address, user_address, size_bytes):
                self.count -= 1
                self.regions[i] = self.regions[self.count]
                self.mapped[i] = self.mapped[self.count]
                self.mapped.pop()
                return
        raise InvalidArgument(f"there is no region of {size_bytes} bytes at {guest_address:#x}")

    def close(self):
        """Unmaps everything; again is fine."""
        self.count = 0
        self.mapped.clear()
        self.log_nothing()

    def log_to(self, int fd, offset_bytes, size_bytes):
        """Counts the pages that are written to from now on in this bitmap. Raises as `add`."""
        cdef Shared shared
        if not 0 < size_bytes <= ADDRESS_MAX or not 0 <= offset_bytes <= ADDRESS_MAX:
            raise InvalidArgument(f"a log of {size_bytes} bytes at {offset_bytes} is none")
        shared = Shared(fd, offset_bytes + size_bytes)
        self.log_memory = shared
        self.log_bytes = size_bytes
        self.log = shared.memory + <uint64_t>offset_bytes

    def take_log_of(self, GuestMemory other not None):
        """Goes on with the log of the table before."""
        self.log, self.log_bytes, self.log_memory = other.log, other.log_bytes, other.log_memory
        other.log_nothing()

    def log_nothing(self):
        self.log = NULL
        self.log_memory = None

    @property
    def torn(self):
        """Whether any of it was cut short under us."""
        return self.is_torn()

    cdef uint8_t *at_guest(self, uint64_t address, uint64_t *length) noexcept nogil:
        cdef Region *region = &self.regions[self.last]
        cdef uint64_t inside = address - region.guest_address
        cdef uint32_t i
        if self.last >= self.count or inside >= region.size_bytes:
            for i in range(self.count):
                region = &self.regions[i]
                inside = address - region.guest_address
                if inside < region.size_bytes:
                    self.last = i
                    break
            else:
                return NULL
        if length[0] > region.size_bytes - inside:
            length[0] = region.size_bytes - inside
        return region.host + inside

    cdef uint8_t *at_user(self, uint64_t address, uint64_t length) noexcept nogil:
        cdef uint32_t i
        cdef uint64_t inside
        for i in range(self.count):
            inside = address - self.regions[i].user_address
            if inside < self.regions[i].size_bytes:
                return self.regions[i].host + inside if length <= self.regions[i].size_bytes - inside else NULL
        return NULL

    cdef void note_written(self, const uint8_t *host, uint64_t length) noexcept nogil:
        cdef uint32_t i
        cdef uint64_t inside, part
        if self.log == NULL:
            return
        while length:               # what lies side by side here may be of regions that a guest has apart
            for i in range(self.count):
                inside = <uint64_t>host - <uint64_t>self.regions[i].host
                if inside < self.regions[i].size_bytes:
                    break
            else:
                return
            part = min(length, self.regions[i].size_bytes - inside)
            self.note_written_at(self.regions[i].guest_address + inside, part)
            host += part
            length -= part

    cdef void note_written_at(self, uint64_t guest_address, uint64_t length) noexcept nogil:
        cdef uint64_t last
        if self.log == NULL or length == 0:
            return
        last = min((guest_address + length - 1) // LOG_PAGE_BYTES, 8 * self.log_bytes - 1)
        if guest_address // LOG_PAGE_BYTES <= last:
            fvd_set_bits(self.log, guest_address // LOG_PAGE_BYTES, last)

    cdef bint is_torn(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self.count):
            if fvd_torn(self.regions[i].watched):
                return True
        return self.log != NULL and self.log_memory.is_torn()
