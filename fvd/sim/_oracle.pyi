# SPDX-License-Identifier: Apache-2.0
"""What the durability contract allows each sector of the guest's disk to hold, computed by none of the engine's code."""

from collections.abc import Sequence
from typing import Final

SECTOR_BYTES: Final = 512

class Violation(AssertionError):
    """The disk showed something that the contract does not allow, or did something that it must not do."""

def unstamp(word: int) -> tuple[int, int] | None:
    """(number of the write, sector) that a word stamps; number 0: the base. None: neither wrote it."""

class Oracle:
    def __init__(self, virtual_size_bytes: int, base_bytes: int | None = None, windows: Sequence[tuple[int, int]] | None = None) -> None:
        """Knows the disk, or the `windows` (first sector, sectors) of it that are used. `base_bytes`: how large a base as in _base is."""
    sectors: int
    """In all windows."""
    clock: int
    numbers: int
    def tick(self) -> int: ...
    def begin_write(self, first_sector: int, sectors: int, *, zero: bool = False, advisory: bool = False) -> int:
        """A write (or zeroing) of whole sectors is submitted. Returns its number. `advisory`: a trim that may be ignored."""

    def stamp(self, number: int, first_sector: int, sectors: int) -> bytes:
        """The content of that write: every sector filled with its number and place."""

    def end_write(self, number: int, succeeded: bool, durable: bool) -> None: ...
    def begin_flush(self) -> int: ...
    def end_flush(self, began: int, succeeded: bool) -> None: ...
    def begin_read(self) -> int: ...
    def drop_read(self, began: int) -> None:
        """That read will show nothing."""

    lands_late: bool
    """A write that failed may still reach the storage after a read that did not show it."""
    def doubt(self) -> None:
        """The storage lost blocks that it had shown: reads may show what was there before, of everything that is not durable, until a flush
        promises it."""

    def outlive_kill(self, *, sent_again: bool) -> None:
        """The process that served the disk was killed, and nothing acknowledged is lost: it binds as before. What was not answered is still
        under way if it is sent again, and may have happened or not if it is not."""

    def survive_kill(self) -> None:
        """The process that served the disk was killed and the device goes on: what was not durable may be seen or not, from now on.

        What a later read shows then stays, until a crash."""

    def check_read(self, first_sector: int, began: int, data: bytes) -> None:
        """A read that began at `began` (begin_read) ends now and returned this. Raises Violation."""

    def check_after_crash(self, data: bytes | bytearray | memoryview) -> None:
        """All windows, one after the other, after a crash and reopen. Raises Violation. Settles nothing."""

    def adopt_after_kill(self, data: bytes | bytearray | memoryview) -> None:
        """All windows, read when the disk was opened again after a kill. Raises Violation.

        What each sector shows is its value from now on, and durable with the next flush like an acknowledged write, unless a write that
        failed left it."""

    def settle_after_crash(self, data: bytes | bytearray | memoryview) -> None:
        """The same; and each sector holds what it shows from now on."""
