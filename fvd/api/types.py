# SPDX-License-Identifier: Apache-2.0
"""What the public functions answer: frozen dataclasses whose fields are also the keys of JSON output. Knows only its own shape.

All sizes and offsets are bytes. Fields are only ever added; a removed or changed one would raise the schema version.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from fvd.base.options import PrefetchOptions as PrefetchOptions
from fvd.modes import CacheMode, ExtentState, Layout, OnFull, Placement

PrefetchState = Literal["off", "delayed", "running", "yielding", "paused", "full", "base-lost", "done"]
T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """The image under a disk, as it was fixed at provision."""

    path: str  # of a file or block device; or a URI
    size: int
    format: str


@dataclass(frozen=True)
class PrefetchStatus:
    """How far a disk is on its way from its base, and what it does about it."""

    volume: str
    state: PrefetchState  # yielding: the guest is active; paused: prefetching was in somebody's way; full: storage is (nearly) full
    reason: str  # of the state, for people
    copy_on_read: bool  # what the guest reads is copied too
    base_bytes: int  # what the disk could need of its base
    copied_bytes: int  # what of it no longer comes from there
    remaining_bytes: int
    bytes_per_second: float = 0.0  # as measured
    limit_bytes_per_second: int | None = None  # as asked for
    eta_seconds: float | None = None  # None: nobody can tell
    resume_seconds: float | None = None  # until a pause or the delay is over
    profile: str | None = None  # the file in use
    profile_remaining_bytes: int = 0
    released: bool = False  # everything is in the disk: the base is closed, and not opened any more


@dataclass(frozen=True)
class SavedProfile:
    """A profile that was written."""

    volume: str
    path: str
    extents: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Profile:
    """What a guest read from a base, in order."""

    path: str
    base_size: int
    bytes: int  # in all
    extents: list[tuple[int, int]]  # (offset, length) in the base


@dataclass(frozen=True)
class PossibleLoss:
    """That acknowledged writes may be gone, until an administrator says that it was seen."""

    seconds: int  # Unix time of the open that found it
    reason: str  # flush_failed, flush_unheard, log_missing; of a later version also others
    message: str  # the same for people


@dataclass(frozen=True)
class Info:
    """What a disk is and how full. Fields with a default say something only of a disk that is open, or of one that was not closed well."""

    volume: str
    uuid: str
    virtual_size: int
    mapped_bytes: int  # storage taken by chunks that hold something
    present_bytes: int  # what does not come from the base
    storage_size: int  # what the disk has now
    metadata_size: int  # part of the storage
    max_storage_size: int  # what it can ever need
    free_bytes: int  # storage that no chunk has taken
    low_water_bytes: int  # a growth step begins when less than this is free; 0: every chunk has its place
    can_grow: bool  # False: only somebody else can add storage
    block_size: int
    chunk_size: int
    journal_size: int
    grow_step: int
    layout: Layout
    placement: Placement
    base: Base | None
    clean: bool  # closed cleanly; False while it is open for writing
    created_seconds: int  # Unix time
    uri: str | None = None  # where it is served by NBD; empty: only to guests by vhost-user; None: it is not served
    vhost_user: str | None = None  # the socket at which guests come in; None: there is none
    queues: int = 0  # that a guest may have there
    guests: int = 0  # that are connected there
    attached: str | None = None  # the block device that it is on this host; None: it is none
    read_only: bool = False
    cache: CacheMode | None = None
    on_full: OnFull | None = None
    waiting_writes: int = 0  # writes that wait for storage
    failed: bool = False  # a flush, durable write or metadata write failed: writes are refused until the disk is opened again
    failed_errno: int = 0  # why
    failed_reason: str = ""  # its text
    failed_seconds: float | None = None  # when: Unix time
    failed_source: str = ""  # whose: this volume, or another on the same device; a path: a flush beside a disk
    no_room_below: bool = False  # what the storage lies on (a file system, a pool) had no space for the last write that needed some
    stopped: str = ""  # why it has stopped for good: somebody else has changed what it lies on; empty: it has not
    growth: dict[str, Any] | None = None  # steps so far, how long they took, the last failure
    statistics: dict[str, int] | None = None  # since it was opened
    copy_on_read: bool = False  # as it is now; of a closed disk: as it will be opened unless one says otherwise
    prefetch_default: bool = False  # whether serving it begins prefetching unless one says otherwise
    prefetch: PrefetchStatus | None = None  # of an open disk that was made over a base
    base_released: bool = False  # everything is in the disk: the base is not needed any more
    possible_loss: PossibleLoss | None = None  # acknowledged writes may be gone; `acknowledge` says that it was seen
    pending_log: str | None = None  # by which writes outlive the server; None: none could be made, or it is not open for writing
    left_open: bool = False  # of a closed disk: its last server died, or has it open on another host
    pending_changes: int = 0  # of such a disk: what its log holds; the next open commits what is in no commit yet
    notices: list[str] = field(default_factory=list)  # what is not as it was asked for, or how the disk was left: lines for people


@dataclass(frozen=True)
class Provisioned(Info):
    """A disk that was provisioned."""

    created: bool = True  # False: it was there, with the same parameters


@dataclass(frozen=True)
class Extent:
    """A part of a disk, all of it in one state."""

    start: int
    length: int
    state: ExtentState  # data: in this disk; base: read from the base; zero: reads as zeros
    storage_offset: int | None  # where it lies in the storage; None: nowhere


@dataclass(frozen=True)
class Map:
    """The extents of a part of a disk, in order, without gaps."""

    volume: str
    offset: int
    length: int
    chunk_size: int
    data_offset: int  # where the metadata ends in the storage
    storage_size: int
    extents: list[Extent]


@dataclass(frozen=True)
class CheckReport:
    """What a check found."""

    volume: str
    clean: bool  # closed cleanly; False while it is open for writing
    mapped_chunks: int
    mapped_bytes: int
    commits_replayed: int  # what the journal holds that the maps on storage do not
    errors: list[str]  # empty: the metadata is whole
    warnings: list[str]  # worth knowing; the disk works
    served: bool = False  # checked while in use, in its server's memory


@dataclass(frozen=True)
class Extended:
    """What an extend did."""

    volume: str
    storage_size: int
    added_bytes: int


@dataclass(frozen=True)
class Listed:
    """A disk that was found."""

    volume: str
    state: str  # "served", "closed", or the kind of the error that keeps it from being read ("in_use", "corrupt"...)
    info: Info | None
    problem: str | None = None
    # Of a logical volume, also where the disk in it cannot be read:
    group: str | None = None
    storage_size: int | None = None  # the logical volume
    virtual_size: int | None = None
    greatest_size: int | None = None  # what the logical volume can become


@dataclass(frozen=True)
class Group:
    """A volume group, and what its disks have been promised."""

    group: str
    size: int
    free_bytes: int  # the growth reserve: what no volume has taken, and can be had: see unusable_bytes
    disks: int
    storage_bytes: int  # the logical volumes of the disks
    mapped_bytes: int  # what of it holds something, of the disks that could be read
    unread_disks: int  # which could not
    virtual_bytes: int
    greatest_bytes: int  # the sum of what the logical volumes can become: what is promised
    available_bytes: int  # storage_bytes and free_bytes
    overcommit: float  # greatest_bytes / available_bytes: above 1, not every disk can become as large as it may
    max_overcommit: float | None  # the group's limit (tag fvd.max_overcommit=R)
    largest_step_bytes: int  # the largest growth step of its disks
    unusable_bytes: int = 0  # free, but on physical volumes that may not be allocated from, or while one is missing or there twice


@dataclass(frozen=True)
class Export:
    """A served volume as its clients see it: those of NBD by ``uri`` (empty: there are none), guests by the socket ``vhost_user``."""

    volume: str
    name: str
    uri: str
    vhost_user: str | None = None


def from_json(kind: type[T], answer: dict[str, Any]) -> T:
    """A dataclass from plain values, which may be those of another version: what is unknown here is left out."""
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in answer.items() if name in known})


def info_from_json(answer: dict[str, Any]) -> Info:
    """An Info with its base, how far that has been copied, and what may be lost."""
    info: Info = from_json(Info, answer)
    base, prefetch, loss = answer.get("base"), answer.get("prefetch"), answer.get("possible_loss")
    return replace(
        info,
        base=None if base is None else from_json(Base, base),
        prefetch=None if prefetch is None else from_json(PrefetchStatus, prefetch),
        possible_loss=None if loss is None else from_json(PossibleLoss, loss),
    )
