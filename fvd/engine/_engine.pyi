# SPDX-License-Identifier: Apache-2.0
"""The engine: turns guest requests into device operations, and keeps the durability contract of docs/internals/durability.md."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

from typing_extensions import Buffer

from fvd.format.geometry import Geometry
from fvd.format.journal import JournalState

class Want(IntEnum):
    """What the engine asks of its Python side; see Engine.want."""

    GROWTH = 1
    EVENT = 2
    STEER = 4
    BASE = 8
    STORAGE_BELOW = 16

class ExtentState(IntEnum):
    """What block status says of an extent: `modes.ExtentState` has the names that a user sees, in this order."""

    EXTENT_DATA = 0
    EXTENT_BASE = 1
    EXTENT_ZERO = 2

SEEDED_BUGS: Final[bool]
"""Whether this build contains the bugs that prove the tests; a release does not."""

def seed_bug(number: int) -> None:
    """Switch one seeded bug on (of fvd._core.Bug; 0: none). Raises RuntimeError in a release build, which contains none."""

class Engine:
    def __init__(
        self,
        geometry: Geometry,
        *,
        uuid: bytes,
        bitmap: Any,
        table: Any | None,
        used_slots: Any,
        journal_state: JournalState,
        dirty_bitmap_pages: Any,
        dirty_table_pages: Any | None,
        storage_size_bytes: int,
        base_size_bytes: int | None = None,
        align_bytes: int = 512,
        read_only: bool = False,
        cache_mode: str = "none",
        on_full: str = "wait",
        wake_below_bytes: int = 0,
        guest_reserve_bytes: int = 0,
        discard: bool = True,
        zero_chunks: bool = False,
        bounce_limit_bytes: int = ...,
        copy_on_read: bool = False,
        copy_limit_bytes: int = ...,
        base_timeout_ns: int = ...,
        pending_log: Buffer | None = None,
        discards_max: int = ...,
        discard_bytes: int = ...,
        first_discard_bytes: int = ...,
        request_window: int = ...,
        commit_limit_bytes: int | None = None,
        durable_writes: bool = True,
    ) -> None:
        """An engine over maps that were loaded and replayed. Takes ownership of the arrays; does no I/O.

        What they were loaded from must be durable: a writer that died may have left a commit that is visible and can still be lost,
        so who opens for writing flushes the storage first.

        `bitmap` has geometry.bitmap_words words, `table`
        geometry.chunks entries (None in the raw layout), `used_slots` one bit per slot. `base_size_bytes` None: no base.
        `wake_below_bytes`, `guest_reserve_bytes`: see the properties.
        `align_bytes`: the device's logical block, 512 or 4096. `copy_on_read`: blocks that guests read from the base are saved, with at
        most `copy_limit_bytes` of them under way; a base read that fails is tried again until its request is `base_timeout_ns` old.
        `pending_log`: writable memory that outlives this process, laid out by fvd.format.pending for these maps: every change of the maps
        that is in no commit yet is in it before the answer that promises it.
        `discards_max`: discards in flight at once, each of at most `discard_bytes` (or one slot), all of them of
        `first_discard_bytes` before the first has ended; `request_window`: operations and jobs
        that one request has under way at most. Defaults: docs/internals/engine.md.
        `commit_limit_bytes`: so many bytes of records at most in one commit, where a quarter of the journal would hold more.
        `durable_writes`: whether a guest's durable write may be one operation; False where the storage may run out of space (R29).
        Raises InvalidArgument, or Corrupt when the storage is too small for what the maps name.
        """

    want: int
    @property
    def inflight_ops(self) -> int: ...
    @property
    def open_requests(self) -> int: ...
    @property
    def failed_errno(self) -> int:
        """0, or the errno after which nothing that needs durability succeeds any more."""

    @property
    def flush_failed_errno(self) -> int:
        """0, or the errno of the first durability operation (flush, durable write) that this disk's own device failed."""

    def note_failed_flush(self, error_number: int) -> None:
        """A flush beside this engine's own failed with this errno (positive): from here on as if it had been its own. Raises
        InvalidArgument."""

    def stop(self) -> None:
        """What the storage holds is not this disk's any more: every request fails from here on (EIO), also those under way and those that
        ended and were not taken yet, and nothing more is read from the storage or written to it. A close ends with an error. Again is
        fine."""

    @property
    def stopped(self) -> bool:
        """Whether it was stopped."""

    def set_storage_size(self, size_bytes: int) -> None:
        """The storage has this size now; writes that waited for a slot go on. Raises Corrupt if a slot in use lies beyond it."""

    def set_exhausted(self, exhausted: bool) -> None:
        """Whether the storage cannot grow now. With on_full="error" the writes that wait for a slot then fail with ENOSPC."""

    def cancel_all_waiting(self, error_number: int) -> int:
        """End every write that waits for a slot with this errno (positive). Returns how many."""

    def commit_soon(self) -> None:
        """Commit what is pending without waiting for the timer or a flush, copies too."""

    def snapshot_maps(self) -> tuple[Any, Any | None]:
        """Copies, in kind, of the bitmap and the table (None in the raw layout) as the guest sees them now."""

    @property
    def free_slots(self) -> int:
        """Slots that the engine may hand out: free ones, and those that wait for a discard."""

    @property
    def align_bytes(self) -> int:
        """What its operations on the storage are multiples of."""

    def expect_enospc(self) -> None:
        """The storage may run out of space from here on: `durable_writes` is False."""

    @property
    def capacity_slots(self) -> int: ...
    @property
    def used_slots_count(self) -> int: ...
    @property
    def lost_slots(self) -> int:
        """Slots in use that nothing knows of: not the table, no chunk that is about to be mapped, none that is about to be free. At any
        moment 0, or a bug of ours."""

    @property
    def mapped_chunks(self) -> int: ...
    @property
    def present_blocks(self) -> int: ...
    @property
    def waiting_writes(self) -> int:
        """Writes that wait for storage to grow."""

    @property
    def storage_size_bytes(self) -> int: ...
    @property
    def guest_reserve_bytes(self) -> int:
        """What copies leave free for the guest, in whole slots; nothing where the storage holds every chunk, for then each has its own."""

    @property
    def wake_below_bytes(self) -> int:
        """Want.GROWTH is set when fewer bytes than this are in free slots. Settable: growth may have to begin earlier, or later, now."""

    @wake_below_bytes.setter
    def wake_below_bytes(self, size_bytes: int) -> None: ...
    @property
    def clean(self) -> bool:
        """Whether storage ends with a clean record, as after a proper close."""

    @property
    def closed_cleanly(self) -> bool:
        """Whether it was closed and everything that it had is durable on storage."""

    def forget_log(self) -> None:
        """The memory of the log is let go; only when nothing will be asked of the engine any more."""

    def adopt_changes(self, keys: Buffer, values: Buffer) -> None:
        """For recovery: these entries of the maps (kind << 56 | number) get these values, to be committed by the next flush. Of an engine
        that has done nothing else; afterwards it may only be flushed. Raises InvalidArgument; Corrupt: more than a commit can take."""

    @property
    def pending_changes(self) -> int:
        """Map entries that differ from what is committed."""

    def statistics(self) -> dict[str, int]:
        """Counters since the engine was made."""

    def leaks(self) -> dict[str, int]:
        """What is still held when nothing is in flight and no request is open: empty, or a bug of ours."""

    def submit_request(self, kind: int, offset_bytes: int, length_bytes: int, buffer_address: int, cookie: int, flags: int = 0) -> None:
        """For drivers in Python: submit one request (kinds and flags as in _engine.pxd)."""

    def complete_operation(self, token: int, result: int) -> None:
        """For drivers in Python: an operation ended with 0 or a negative errno. Raises RuntimeError if it was not in flight."""

    def advance_clock(self, now_ns: int) -> None: ...
    def take_operations(self) -> list[tuple[int, int, int, int, int, int, bool]]:
        """[(token, kind, target, offset_bytes, length_bytes, buffer_address, durable)] since the last call."""

    def take_done(self) -> list[tuple[int, int]]:
        """[(cookie, error)] of the requests finished since the last call; error is 0 or a negative errno."""

    def list_extents(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
        """[(length_bytes, state)] covering the range; state is 0 data, 1 base, 2 zero."""

    copy_on_read: bool
    """Whether blocks that guests read from the base are saved. Settable at any time."""
    prefetch_depth: int
    """So many copies of prefetching are under way at once; 0 pauses it."""
    prefetch_rate_bytes: int
    """Prefetching reads no more than this per second; 0: no limit."""
    prefetch_idle_ns: int
    """Prefetching begins no copy while a guest's request is in flight or has been within this time; 0: it does not look."""
    @property
    def base_failing(self) -> bool:
        """The last read of the base failed."""

    @property
    def base_released(self) -> bool:
        """Every block that the base reaches is present and committed: it is never read again. False without a base."""

    def prefetch_plan(self, extents: Sequence[tuple[int, int]]) -> None:
        """What to copy from the base without being asked, in this order: (offset_bytes, length_bytes); none ends prefetching."""

    @property
    def prefetching(self) -> bool:
        """Whether something of the plan is still to be copied or on its way."""

    @property
    def base_remaining_bytes(self) -> int:
        """What would still be read from the base."""

    @property
    def waits_for_clock(self) -> bool:
        """Whether a base read, or a write that found no space below the storage, waits for the time of its next attempt."""

    @property
    def storage_below_full(self) -> bool:
        """What the storage lies on (a file system, a pool) had no space for the last guest's write that needed some."""

    @property
    def starved_count(self) -> int:
        """Writes that found none there and wait for it."""

    def read_profile(self) -> list[tuple[int, int]]:
        """[(offset_bytes, length_bytes)] of what guests read from the base since the engine was made, in order."""

    def copy_counters(self) -> dict[str, int]:
        """Counters of copies and of what they compete with, since the engine was made; `now_ns` and `guest_last_ns` are its clock."""
