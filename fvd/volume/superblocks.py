# SPDX-License-Identifier: Apache-2.0
"""The two superblock slots of a volume: read, changed, wiped. Order matters here and is FORMAT.md section 8; bytes are `fvd.format`'s."""

from __future__ import annotations

from typing import Protocol

from fvd.device.node import Bytes, Data, Node
from fvd.device.wiping import Progress, wipe
from fvd.errors import Corrupt, FvdError, NotFound, Unsupported
from fvd.format.geometry import JOURNAL_OFFSET_BYTES, PAGE_BYTES
from fvd.format.journal import PAGE_MAGIC
from fvd.format.superblock import MAGIC, SLOT_OFFSETS_BYTES, SUPERBLOCK_BYTES, Superblock, choose, encode

_REMAINS_BYTES = JOURNAL_OFFSET_BYTES + 2 * PAGE_BYTES


class Pages(Protocol):
    """What is needed of a `fvd.device.node.Node`. Tests put a device of their own here, which fails or forgets."""

    path: str

    def size_bytes(self) -> int: ...
    def pread(self, offset_bytes: int, length_bytes: int, /) -> Bytes: ...
    def pread_into(self, offset_bytes: int, buffer: Bytes, /) -> None: ...
    def pwrite(self, offset_bytes: int, data: Data, /) -> None: ...
    def zero(self, offset_bytes: int, length_bytes: int, /) -> None: ...
    def flush(self) -> None: ...


def read_superblock_slots(node: Pages) -> tuple[bytes, bytes] | None:
    """The pages of both slots; None if the storage is too small to have them."""
    if node.size_bytes() < SLOT_OFFSETS_BYTES[1] + SUPERBLOCK_BYTES:
        return None
    first, second = (node.pread(offset, SUPERBLOCK_BYTES).tobytes() for offset in SLOT_OFFSETS_BYTES)
    return first, second


def read_superblock(node: Pages) -> Superblock:
    """The superblock in force. Raises NotFound (no fvd disk), Corrupt, Unsupported, naming the volume."""
    slots = read_superblock_slots(node)
    if slots is None:
        raise NotFound(f"{node.path} holds no fvd disk: it is only {node.size_bytes()} bytes long")
    try:
        return choose(*slots)
    except NotFound as error:
        raise NotFound(f"{node.path} holds no fvd disk; make one with fvd-lv provision") from error
    except (Corrupt, Unsupported) as error:
        raise type(error)(f"{node.path}: {error}") from error


def has_magic(node: Pages) -> bool:
    """Whether a slot begins like a superblock, be it valid or not."""
    slots = read_superblock_slots(node)
    return slots is not None and any(page.startswith(MAGIC) for page in slots)


def write_superblock(node: Pages, superblock: Superblock) -> None:
    """Puts the superblock in its generation's slot, durably. The other slot stays as it is. Raises DeviceError."""
    node.pwrite(SLOT_OFFSETS_BYTES[superblock.slot], encode(superblock))
    node.flush()


def wipe_superblocks(node: Pages) -> None:
    """Afterwards the storage holds no disk, durably. Stopped half-way it holds the same disk as before, or none. Raises DeviceError."""
    for offset in SLOT_OFFSETS_BYTES:
        node.pwrite(offset, bytes(SUPERBLOCK_BYTES))
    node.flush()


def wipe_storage(node: Node, progress: Progress | None = None) -> None:
    """Everything that the storage of a removed disk held is zeros afterwards; until then it is known for one (`holds_remains`)."""
    wipe(node, _REMAINS_BYTES, progress)


def state_of(node: Pages) -> Superblock | FvdError:
    """The superblock, or why there is none."""
    try:
        return read_superblock(node)
    except (NotFound, Corrupt, Unsupported) as error:
        return error


def is_blank(node: Pages) -> bool:
    """Whether both slots hold nothing at all: as after a remove, or before the end of a provision."""
    slots = read_superblock_slots(node)
    return slots is not None and not any(any(page) for page in slots)


def holds_remains(node: Pages) -> bool:
    """Whether an interrupted remove or provision has been here: a journal (its second page is written first) and no superblock."""
    return is_blank(node) and node.size_bytes() >= _REMAINS_BYTES and _is_journal(node.pread(JOURNAL_OFFSET_BYTES + PAGE_BYTES, PAGE_BYTES))


def _is_journal(page: Bytes) -> bool:
    return page[: len(PAGE_MAGIC)].tobytes() == PAGE_MAGIC


def uuid_text(uuid: bytes) -> str:
    """A UUID as people write it."""
    digits = uuid.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
