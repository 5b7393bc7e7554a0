# SPDX-License-Identifier: Apache-2.0
"""What the rest asks of a place that holds disks. A `Storage` is the size of one that is open; a `Provider` is what happens to its *name*:
made, attached, released, removed. Shapes only, and no shape knows what a disk's bytes mean.

`file_provider`, `device_provider` and `lvm_provider` have these shapes; `provider.provider_for` chooses. docs/growth.md says what an
implementation must promise.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fvd.device.node import Identity, Node
from fvd.volume.name import VolumeName


@dataclass(frozen=True)
class Pool:
    """What a storage takes its growth from."""

    name: str  # a volume group, a file system
    free_bytes: int


@runtime_checkable
class Storage(Protocol):
    """The place where one open disk lives.

    `grow_to`, `size_bytes` and `pool` are called from threads of the allocator, `grow_to` and `pool` never twice at a time, though one
    beside the other; `close` from any, also while a call hangs.
    """

    can_grow: bool  # False: only somebody else can make it larger
    notifies_space: bool  # `Allocator.on_space_freed` is called when there may be space again: failures are repeated ever less often
    last_suspend_seconds: float | None  # how long the device was suspended in the last `grow_to`; None: unknown, or never

    def size_bytes(self) -> int:
        """The size now, asked of the open descriptor. Whatever `grow_to` reported, this is the truth. Raises DeviceError."""

    def grow_to(self, size_bytes: int) -> None:
        """Makes the storage at least `size_bytes` long, without changing a byte that it holds; never makes it shorter. The size is durable
        after the next flush of the storage at the latest, and nothing is flushed here.

        May stop half-way. Raises NoSpace (the group or file system is full), Unsupported (cannot grow), Timeout, DeviceError.
        """

    def pool(self) -> Pool | None:
        """What growth is taken from, and what it has left; None: nothing to tell. May take as long as a command. Raises FvdError."""

    def close(self) -> None:
        """No more calls. One that is still running ends by itself and changes nothing but the size."""


class Ground(Protocol):
    """A Storage that can tell whether what it holds still lies where it lay: somebody may shrink or remap it behind the disk."""

    def hold(self, size_bytes: int, most_bytes: int, on_moved: Callable[[str], None]) -> None:
        """So much of it is used from now on, and what it grows by, up to `most_bytes`. `on_moved(why)` is called, once, in whatever thread
        it is found out, when what it holds is not what it was, perhaps before this returns: a step of its own never is a reason."""

    def look(self) -> None:
        """Something has happened to it. Takes no time."""


class GroundedStorage(Storage, Ground, Protocol):
    """Both: what a provider gives for an open disk."""


class Presence(enum.Enum):
    """What a name leads to, as far as can be told from outside."""

    ABSENT = "absent"
    UNFINISHED = "unfinished"  # ours, and nothing in it is to be believed
    PRESENT = "present"  # what it holds tells what it is
    FOREIGN = "foreign"  # not ours, and no superblock in it is to be believed


class Contents(enum.Enum):
    """What a volume that is being built holds now."""

    BLANK = "blank"  # every byte is known to be zero
    NOBODYS = "nobodys"  # leftovers that nobody may see again: overwritten without a question
    OURS = "ours"  # a disk if there is a superblock; otherwise looked at before it is overwritten
    FOREIGN = "foreign"  # looked at before it is overwritten; a superblock there is somebody else's


@dataclass(frozen=True)
class Plan:
    """The volume that a disk needs. Sizes in bytes."""

    size_bytes: int  # at first
    virtual_size_bytes: int
    most_bytes: int  # the greatest it can ever need
    grow_step_bytes: int
    max_overcommit: float | None = None  # of its volume group; None: whatever the group says itself
    base_mark: str = ""  # what is noted of its base, where no guest can write; "": it has none


Wipe = Callable[[Node], None]


class Attached(Protocol):
    """A volume that can be opened, until `close`."""

    path: str
    ours: bool  # made by fvd for a disk: blank contents are a half-removed disk, not somebody's

    @property
    def size_bytes(self) -> int | None:
        """What it was promised to have when it was attached, whatever its device shows; None: what it shows."""

    @property
    def base_marks(self) -> frozenset[str] | None:
        """What was noted of its base (`Plan.base_mark`); None: nothing can be noted of it where its user could not change it."""

    def storage(self, node: Node) -> GroundedStorage:
        """The growing end of the open volume."""

    def __enter__(self) -> Attached: ...

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        """Lets go of it, when everything in it is closed. Never raises for what is detached already."""

    def is_wiped(self) -> bool:
        """Whether all that it held is to be zeros before it is given back, whatever whoever removes it asks for."""

    def begin_wipe(self) -> None:
        """From here on `is_wiped`, also for whoever goes on after a crash, if that can be noted there."""

    def check_retirable(self) -> None:
        """Before anything is wiped: raises what would keep the place from being given back."""

    def retire(self, identity: Identity) -> None:
        """Under the claim on what has this identity, when its disk has been wiped: gives the place back as far as that can be done there.

        Again is fine.
        """

    def reclaim(self) -> None:
        """Gives back what `retire` could not, when the claim has been given up and before `close`."""


class Building(Protocol):
    """A place in the making: claimed, and not yet under its name if the provider can hide it."""

    node: Node
    contents: Contents

    def ensure_size(self, size_bytes: int) -> None:
        """At least this large, if its size is ours to choose. Raises NoSpace."""

    def publish(self, *, replace: bool) -> None:
        """Puts it under its name, durably. `replace`: whatever has the name is given up for it. Raises Conflict."""

    def close(self) -> None:
        """Lets go of it; if it was never published, removes what was built."""


class Provider(Protocol):
    """Where volumes of one kind live. Stateless: safe from threads."""

    fixed_size: bool  # making, sizing and removing a volume is somebody else's business
    in_place: bool  # a new disk is written where the old contents are; otherwise beside them, and takes the name at the end

    def presence(self, name: VolumeName) -> Presence:
        """What the name leads to now."""

    def attach(self, name: VolumeName, *, looking: bool = False) -> Attached:
        """Makes the volume reachable (LVM: activates it). `looking`: it is left afterwards as it was.

        Raises NotFound, InUse, InvalidArgument (another kind has this name)...
        """

    def build(self, name: VolumeName, plan: Plan) -> Building:
        """Begins a volume. What an interrupted build left behind is replaced. Raises InUse, NoSpace, NotFound."""

    def forget_unfinished(self, name: VolumeName, wipe: Wipe | None = None) -> None:
        """Removes what an interrupted `build` left behind, unless somebody is at work on it. May raise InUse.

        `wipe` is called on what is to be wiped first, if it may hold something of a disk; None: the provider's own.
        """


class AttachedPath:
    """A volume that is always reachable: its path is all there is to it."""

    ours = False

    size_bytes: int | None = None

    base_marks: frozenset[str] | None = None

    def __init__(self, path: str, storage: Callable[[Node], GroundedStorage], retire: Callable[[Identity], None] = lambda _: None) -> None:
        self.path = path
        self._storage = storage
        self._retire = retire

    def storage(self, node: Node) -> GroundedStorage:
        return self._storage(node)

    def __enter__(self) -> AttachedPath:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def is_wiped(self) -> bool:
        return False

    def begin_wipe(self) -> None:
        pass

    def check_retirable(self) -> None:
        pass

    def retire(self, identity: Identity) -> None:
        self._retire(identity)

    def reclaim(self) -> None:
        pass
