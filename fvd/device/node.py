# SPDX-License-Identifier: Apache-2.0
"""Open files and block devices: whole transfers at given offsets, direct or through the page cache, with errors that say what to do.

For metadata and for everything that is not the data path (that one has its own queues). Knows neither the disk format nor the engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from fvd._lifetime import between_forks, keep
from fvd.device.failures import reported
from fvd.device.folders import Place, open_path
from fvd.device.stack import Stack, free_bytes_of, stack_of
from fvd.errors import DeviceError, FvdError, InvalidArgument, NoSpace, NotFound, PermissionDenied, Unsupported

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

Bytes = memoryview  # of bytes, writable
Data: TypeAlias = Any  # what has a buffer of bytes, numpy's arrays too
# What a node is, whatever path led to it: ("block", device number, 0) or ("file", file system, inode).
Identity = tuple[str, int, int]

PAGE_BYTES = 4096
SECTOR_BYTES = 512
TRANSFER_BYTES = 4 << 20  # one system call moves at most this much: it bounds the bounce buffer

# <linux/fs.h>; Python's fcntl module does not name them.
BLKROGET = 0x125E
BLKSSZGET = 0x1268
BLKGETSIZE64 = 0x80081272
BLKZEROOUT = 0x127F

_FALLOC_KEEP_SIZE = 1
_FALLOC_ZERO_RANGE = 16
_SYNC_FILE_RANGE_WAIT_BEFORE = 1
_NOWHERE_BYTES = 1 << 62
_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)


def typed_error(error: OSError, what: str, path: str) -> FvdError:
    """The typed exception for `error`, which happened while fvd was doing `what` ("reading", "opening") to `path`."""
    number = error.errno
    reason = os.strerror(number) if number else str(error)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"{path} does not exist ({what} it failed); check the name")
    if number in (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
        return NotFound(f"{path} names a device that is not there ({reason}); attach or activate it")
    if number in (errno.EACCES, errno.EPERM):
        return PermissionDenied(f"{what} {path} is not permitted ({reason}); check its owner and mode, or run as a user who may")
    if number == errno.EROFS:
        return PermissionDenied(f"{what} {path} failed: it lies on read-only storage; open it read-only")
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(f"{what} {path} failed: {reason}; free some space and try again")
    if number in (errno.EMFILE, errno.ENFILE):
        return Unsupported(f"{what} {path} failed: {reason}; raise the limit on open files (ulimit -n)")
    if number in (errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR):
        return InvalidArgument(f"{path} cannot be opened: {reason}")
    return DeviceError(f"{what} {path} failed: {reason}")


@contextlib.contextmanager
def typed_errors(what: str, path: str) -> Iterator[None]:
    """Turns every OSError of the block into its typed exception (see `typed_error`)."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FvdError):
            raise
        raise typed_error(error, what, path) from error


def identity_of(status: os.stat_result) -> Identity:
    """The identity behind a stat result."""
    if stat.S_ISBLK(status.st_mode):
        return ("block", status.st_rdev, 0)
    return ("file", status.st_dev, status.st_ino)


_HUGE_BYTES = 4 << 20


def aligned_buffer(size_bytes: int) -> Bytes:
    """A page-aligned, zeroed buffer that O_DIRECT accepts."""
    if size_bytes == 0:
        return memoryview(bytearray())
    # Private: the shared mapping that mmap makes by default costs twice as much at the first touch of each page.
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size_bytes >= _HUGE_BYTES:
        # Thousands of page faults were a third of the time that open() takes (1 TiB: 38 ms with them, 26 without). It is advice: a
        # kernel without huge pages says EINVAL.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _is_aligned(view: memoryview) -> bool:
    """Whether O_DIRECT takes it as it is. What can only be read is not asked: nobody aligns that."""
    return not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE_BYTES == 0


class Node:
    """An open regular file or block device. `open_node` makes one; the constructor itself does no I/O.

    All offsets and lengths are bytes. With `direct`, both must be multiples of `logical_block_bytes`. Safe from threads.
    """

    def __init__(
        self,
        path: str,
        fd: int,
        *,
        is_block: bool,
        read_only: bool,
        direct: bool,
        logical_block_bytes: int,
        identity: Identity,
        notice: str | None = None,
        sampler_fd: int = -1,
    ) -> None:
        self.path = path
        self.fd = fd
        # R28: another open file of the same node, from before anything was written: it hears of every page that the kernel could not
        # write, whoever else was told. -1: transfers do not go through the page cache, or nothing is written.
        self.sampler_fd = sampler_fd
        self.is_block = is_block
        self.read_only = read_only
        self.direct = direct
        self.logical_block_bytes = logical_block_bytes
        self.identity = identity
        keep(self, lambda node: (node.fd, node.sampler_fd))
        self.notice = notice  # why something that was asked for is not so: worth a line to the user

    def __enter__(self) -> Node:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        words = ["direct"] * self.direct + ["read-only"] * self.read_only + ["closed"] * (self.fd < 0)
        return f"<Node {' '.join([self.path, *words])}>"

    def size_bytes(self) -> int:
        """The size now, asked of the open descriptor: it is the truth when storage has grown under us. Raises DeviceError."""
        with typed_errors("asking the size of", self.path):
            return descriptor_size_bytes(self._open_fd())

    def pread(self, offset_bytes: int, length_bytes: int) -> Bytes:
        """Exactly `length_bytes` from `offset_bytes`, page-aligned. A shorter device or file: DeviceError."""
        self._check_range(offset_bytes, length_bytes)
        data = aligned_buffer(length_bytes)
        self.pread_into(offset_bytes, data)
        return data

    def pread_into(self, offset_bytes: int, buffer: Buffer) -> None:
        """Fills `buffer`, which must be page-aligned where `direct` is on. Raises as `pread`."""
        view = memoryview(buffer).cast("B")
        length_bytes = len(view)
        self._check_range(offset_bytes, length_bytes)
        fd = self._open_fd()
        done = 0
        while done < length_bytes:
            with typed_errors(f"reading {length_bytes} bytes at {offset_bytes} of", self.path):
                count = os.preadv(fd, [view[done : done + TRANSFER_BYTES]], offset_bytes + done)
            if count == 0:
                raise DeviceError(f"{self.path} ends at byte {offset_bytes + done}, before the {length_bytes} bytes at {offset_bytes}")
            done += count

    def pwrite(self, offset_bytes: int, data: Data) -> None:
        """All of `data` at `offset_bytes`. Not durable before `flush`. Raises NoSpace, DeviceError, PermissionDenied."""
        source = memoryview(data).cast("B")
        length = len(source)
        self._check_range(offset_bytes, length)
        self._check_writable()
        fd = self._open_fd()
        bounce = self.direct and length > 0 and not _is_aligned(source)
        buffer = aligned_buffer(min(length, TRANSFER_BYTES)) if bounce else source
        done = 0
        while done < length:
            count = min(length - done, TRANSFER_BYTES)
            if bounce:
                buffer[:count] = source[done : done + count]
                piece = buffer[:count]
            else:
                piece = source[done : done + count]
            with typed_errors(f"writing {length} bytes at {offset_bytes} of", self.path):
                written = os.pwritev(fd, [piece], offset_bytes + done)
            if written == 0:
                raise DeviceError(f"{self.path} took no data at byte {offset_bytes + done}")
            done += written

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """The range reads as zeros afterwards; the device is asked to do it, and written to when it cannot. Durable after `flush`."""
        self._check_range(offset_bytes, length_bytes)
        self._check_writable()
        fd = self._open_fd()
        if length_bytes == 0:
            return
        try:
            if self.is_block:
                fcntl.ioctl(fd, BLKZEROOUT, struct.pack("=QQ", offset_bytes, length_bytes))
            else:
                _fallocate(fd, _FALLOC_ZERO_RANGE | _FALLOC_KEEP_SIZE, offset_bytes, length_bytes)
                if os.fstat(fd).st_size < offset_bytes + length_bytes:
                    raise OSError(errno.EOPNOTSUPP, "the file is shorter: zeros must be written")
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise typed_error(error, f"zeroing {length_bytes} bytes at {offset_bytes} of", self.path) from error
        zeros = aligned_buffer(min(length_bytes, TRANSFER_BYTES))
        for done in range(0, length_bytes, TRANSFER_BYTES):
            self.pwrite(offset_bytes + done, zeros[: min(TRANSFER_BYTES, length_bytes - done)])

    def flush(self) -> None:
        """Everything written before is durable when this returns. Raises DeviceError: then nothing may be assumed of earlier writes."""
        with typed_errors("flushing", self.path), reported(lambda: self.stack().devices, self.path):
            os.fdatasync(self._open_fd())
            if self.sampler_fd >= 0:
                _ask_sampler(self.sampler_fd)

    def stack(self) -> Stack:
        """What it lies on now. Asks sysfs; raises DeviceError when it has been closed."""
        with typed_errors("looking at", self.path):
            fd = self._open_fd()
            return stack_of(os.fstat(fd), free_bytes=None if self.is_block else free_bytes_of(os.fstatvfs(fd)))

    def block_bytes_now(self) -> int:
        """What direct transfers must be multiples of now: a device that grew may have come to lie on one with larger blocks."""
        if not (self.is_block and self.direct):
            return self.logical_block_bytes
        with typed_errors("asking the blocks of", self.path):
            return _logical_block_bytes(self._open_fd(), is_block=True, direct=True)

    def is_read_only_now(self) -> bool:
        """Whether it is a device that refuses writes by now."""
        with typed_errors("looking at", self.path):
            return self.is_block and _device_is_read_only(self._open_fd())

    def forget_cache(self) -> None:
        """What is read from here on comes from the device, as far as it had been flushed, not from the page cache."""
        with typed_errors("dropping the page cache of", self.path):
            os.posix_fadvise(self._open_fd(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes the descriptor; again is fine. Flushes nothing."""
        descriptors, self.fd, self.sampler_fd = (self.fd, self.sampler_fd), -1, -1
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)

    def _open_fd(self) -> int:
        if self.fd < 0:
            raise DeviceError(f"{self.path} has been closed")
        return self.fd

    def _check_writable(self) -> None:
        if self.read_only:
            raise PermissionDenied(f"{self.path} was opened read-only")

    def _check_range(self, offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes < 0 or length_bytes < 0:
            raise InvalidArgument(f"{self.path}: a range cannot be negative: {length_bytes} bytes at {offset_bytes}")
        block = self.logical_block_bytes
        if self.direct and (offset_bytes % block or length_bytes % block):
            raise InvalidArgument(
                f"{self.path} is open for direct transfers, which must be multiples of its {block}-byte blocks: "
                f"{length_bytes} bytes at {offset_bytes} are not"
            )


def open_node(path: str | os.PathLike[str], *, read_only: bool = False, direct: bool = True, sharing: int | None = None) -> Node:
    """Opens a regular file or block device.

    `direct` asks for O_DIRECT; where the file system refuses it the page cache is used and `notice` says so. `sharing`: a descriptor of the
    same file, opened for the same access, whose open file is used instead of a new one: its locks then last as long as any transfer (R35).
    Raises NotFound, PermissionDenied, Unsupported (a directory, a pipe...), DeviceError.
    """
    with between_forks:
        return _open_node(os.fspath(path), read_only, direct, sharing)


def _open_node(name: str, read_only: bool, direct: bool, sharing: int | None) -> Node:
    access = os.O_RDONLY if read_only else os.O_RDWR
    with typed_errors("opening", name):
        # Before the open: opening a pipe would wait for its other end.
        check_kind(name, Path(name).stat() if sharing is None else os.fstat(sharing))
        notice = None
        fd = -1
        if direct:
            try:
                fd = _open_file(name, access, os.O_DIRECT, sharing)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
                notice = f"{name}: its file system refuses O_DIRECT; the page cache is used"
        if fd < 0:
            fd = _open_file(name, access, 0, sharing)
            direct = False
        try:
            status = os.fstat(fd)
            check_kind(name, status)
            is_block = stat.S_ISBLK(status.st_mode)
            if is_block and not read_only and _device_is_read_only(fd):
                raise PermissionDenied(f"{name} is a read-only device; open it read-only, or make it writable (blockdev --setrw)")
            block_bytes = _logical_block_bytes(fd, is_block, direct)
            if direct and (block_bytes == 0 or block_bytes > PAGE_BYTES):
                reason = "its file system refuses O_DIRECT" if block_bytes == 0 else f"O_DIRECT there needs {block_bytes}-byte blocks"
                notice = f"{name}: {reason}; the page cache is used"
                os.close(fd)
                fd = _open_file(name, access, 0, sharing)
                direct = False
                status = os.fstat(fd)
                block_bytes = _logical_block_bytes(fd, is_block, direct)
            sampler_fd = -1 if read_only or (is_block and direct) else _open_sampler(fd, name, status)
        except BaseException:
            os.close(fd)
            raise
    return Node(
        name,
        fd,
        is_block=is_block,
        read_only=read_only,
        direct=direct,
        logical_block_bytes=block_bytes,
        identity=identity_of(status),
        notice=notice,
        sampler_fd=sampler_fd,
    )


def _open_sampler(opened: int, name: str, status: os.stat_result) -> int:
    """An open file of its own of the node with this status: not a duplicate, which shares its reports."""
    try:
        fd = os.open(f"/proc/self/fd/{opened}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:  # no /proc here
        fd = open_path(name, os.O_RDONLY | os.O_NONBLOCK)
    if identity_of(os.fstat(fd)) != identity_of(status):
        os.close(fd)
        raise DeviceError(f"{name} has become another file while it was opened; try again")
    return fd


def _ask_sampler(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint]
    if libc.sync_file_range(fd, _NOWHERE_BYTES, 1, _SYNC_FILE_RANGE_WAIT_BEFORE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _open_file(name: str, access: int, flags: int, sharing: int | None) -> int:
    if sharing is None:
        return open_path(name, access | flags)
    fd = fcntl.fcntl(sharing, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        # Also takes O_NONBLOCK away, with which io_uring answers EAGAIN where it should wait.
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_file(place: Place, name: str, size_bytes: int, *, mode: int = 0o600) -> int:
    """A descriptor of a new sparse file of `size_bytes` in the place's folder. Never overwrites: FileExistsError.

    Nobody else may read it unless `mode` says so. Raises NotFound (no such directory), PermissionDenied, NoSpace.
    """
    try:
        fd = place.create(name, mode)
    except FileExistsError:
        raise
    except OSError as error:
        raise typed_error(error, "creating", place.path) from error
    try:
        with typed_errors(f"sizing (to {size_bytes} bytes)", place.path):
            os.ftruncate(fd, size_bytes)
    except BaseException:
        with contextlib.suppress(OSError):
            place.remove(name, only=fd)
        os.close(fd)
        raise
    return fd


def descriptor_size_bytes(fd: int) -> int:
    """The size of an open file or block device. Raises OSError."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    size: int = struct.unpack("=Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]
    return size


def check_kind(name: str, status: os.stat_result) -> None:
    """Raises Unsupported unless the status is that of a regular file or a block device."""
    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return
    kind = "a directory" if stat.S_ISDIR(status.st_mode) else "neither a regular file nor a block device"
    raise Unsupported(f"{name} is {kind}; name a file or a block device")


def _device_is_read_only(fd: int) -> bool:
    return bool(struct.unpack("=i", fcntl.ioctl(fd, BLKROGET, bytes(4)))[0])


def _logical_block_bytes(fd: int, is_block: bool, direct: bool) -> int:
    """What direct transfers must be multiples of; 0: direct transfers do not work here."""
    if is_block:
        size: int = struct.unpack("=i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0]
        return size
    if not direct:
        return SECTOR_BYTES
    told = _statx_direct_alignment(fd)
    if told is not None:
        return max(told, SECTOR_BYTES) if told else 0
    # A kernel before 6.1 does not tell. Reads that cross nothing: the larger size is always right where the smaller is.
    for size_bytes in (SECTOR_BYTES, PAGE_BYTES):
        with mmap.mmap(-1, PAGE_BYTES) as page:
            view = memoryview(page)
            try:
                count = os.preadv(fd, [view[:size_bytes]], 0)
                return size_bytes if count else PAGE_BYTES  # an empty file proves nothing
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            finally:
                view.release()
    return 0


def _statx_direct_alignment(fd: int) -> int | None:
    """stx_dio_offset_align of the descriptor; None: this kernel or C library does not tell."""
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return None
    answer = ctypes.create_string_buffer(256)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", answer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory_align, offset_align = struct.unpack_from("=II", answer, 152)
    return max(int(offset_align), int(memory_align)) if offset_align else 0


def _fallocate(fd: int, mode: int, offset_bytes: int, length_bytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    while libc.fallocate(fd, mode, offset_bytes, length_bytes) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
