# SPDX-License-Identifier: Apache-2.0
"""Power fails at every operation of provision, extend, an open after a crash, and remove, over what others left on the storage.

At every moment there is no disk, or a whole one; doing it again always succeeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from devtools.sweep import sweep
from fvd.base.sparse import runs, zero_blocks
from fvd.disk import provision as provision_module
from fvd.disk.loading import load_disk
from fvd.disk.opening import begin_generation
from fvd.disk.provision import write_disk
from fvd.disk.recovery import recover_disk
from fvd.errors import Corrupt, NotFound
from fvd.format.geometry import Geometry, Layout
from fvd.format.journal import encode_commit, page_offset_bytes
from fvd.format.maps import MapKind, empty_bitmap, empty_table, encode_pages, map_offset_bytes, map_pages
from fvd.format.superblock import BaseReference, Superblock
from fvd.inspect.check import check_node
from fvd.sim._device import WRITE, SimulatedDevice
from fvd.sim._oracle import Violation
from fvd.sim._rng import Rng
from fvd.sim.device_node import Budget, DeviceNode, VolatileNode
from fvd.sim.stage import Stage
from fvd.volume import superblocks
from fvd.volume.name import parse_name
from fvd.volume.superblocks import is_blank, state_of, wipe_superblocks, write_superblock

pytestmark = pytest.mark.checked_once

GEOMETRY = Geometry(
    virtual_size_bytes=1 << 20, block_size_bytes=4096, chunk_size_bytes=65536, journal_size_bytes=65536, grow_step_bytes=65536
)
OURS = Superblock(GEOMETRY, b"o" * 16, 2, None, 0)
THEIRS = Superblock(GEOMETRY, b"t" * 16, 2, None, 0)
RAW_GEOMETRY = replace(GEOMETRY, layout=Layout.RAW)
BASE = BaseReference("/base", (1 << 20) - 100)
ZEROS = zero_blocks(GEOMETRY, BASE.size_bytes, [(0, 40960), (262144, 8192), ((1 << 20) - 8192, 8092)])
OVER_HOLES = {
    layout: replace(OURS, geometry=geometry, base=BASE) for layout, geometry in zip(Layout, (GEOMETRY, RAW_GEOMETRY), strict=True)
}
NAME = parse_name("file:/simulated")
SIZE_BYTES = GEOMETRY.data_offset_bytes + 4 * GEOMETRY.chunk_size_bytes


class Scene:
    """A storage with something on it, and what may be found there: `allowed` superblocks (by UUID), or none."""

    def __init__(self, before: Callable[[DeviceNode], None], logical_block_bytes: int, size_bytes: int = SIZE_BYTES) -> None:
        self.budget = Budget()
        self.device = SimulatedDevice(size_bytes + 65536, logical_block_bytes, Rng(1), regions=(1 << 20, 1 << 21, 1 << 22))
        self.device.grow(size_bytes, b"\xf0FOREIGN")
        self.still = DeviceNode(self.device, direct=True)
        before(self.still)
        self.still.flush()
        self.may_be_absent = True
        self.allowed = {OURS.uuid}
        self.ours = OURS

    @property
    def node(self) -> VolatileNode:
        return VolatileNode(self.device, self.budget)

    def judge(self) -> None:
        node = DeviceNode(self.device, direct=True)
        found = state_of(node)
        if not isinstance(found, Superblock):
            if not self.may_be_absent or not isinstance(found, NotFound | Corrupt):
                raise Violation(f"no disk is found: {found}")
        else:
            if found.uuid not in self.allowed:
                raise Violation(f"a disk is found that was to be gone: {found.uuid!r}")
            if found.uuid == THEIRS.uuid:
                return  # it was there, and still is: what it holds is its own affair
            disk = load_disk(node)
            zeros = disk.superblock.base is not None
            if not np.array_equal(disk.bitmap, ZEROS if zeros else np.zeros_like(ZEROS)):
                raise Violation("the disk has contents that nobody wrote")
            if disk.table is not None and set(disk.table) != {0xFFFFFFFF}:
                raise Violation("the disk has chunks that nobody wrote")
            if zeros and disk.table is None:
                self._check_places(node)
            if errors := check_node(node, NAME).errors:
                raise Violation(f"check: {errors}")
        image = bytes(self.device.image)
        wipe_superblocks(node)
        if not is_blank(node):
            raise Violation("removing does not end the disk")
        write_ours(node, self.ours)
        if load_disk(node).superblock != self.ours:
            raise Violation("provisioning again does not make the disk")
        self.device.put_back(image)

    @staticmethod
    def _check_places(node: DeviceNode) -> None:
        for first, end in runs(ZEROS, RAW_GEOMETRY.blocks):
            if any(node.pread(RAW_GEOMETRY.data_offset_bytes + first * 4096, (end - first) * 4096)):
                raise Violation("blocks that are said to be zeros show what the storage held before")


def write_ours(node: DeviceNode, superblock: Superblock) -> None:
    """As provision() writes it, on storage that makes zeros when it is asked to."""

    def punch(offset_bytes: int, length_bytes: int) -> bool:
        node.zero(offset_bytes, length_bytes)
        return True

    write_disk(node, superblock, zeros=None if superblock.base is None else ZEROS, punch=punch)


def nothing(node: DeviceNode) -> None:
    """Foreign bytes."""


def zeros(node: DeviceNode) -> None:
    node.zero(0, SIZE_BYTES)


def their_disk(node: DeviceNode) -> None:
    """Another tenant's disk: valid superblocks, maps that name its chunks, commits in its journal, where ours will be."""
    write_disk(node, THEIRS)
    bitmap, table = empty_bitmap(GEOMETRY), empty_table(GEOMETRY)
    assert table is not None
    for word in range(len(bitmap)):
        bitmap[word] = 0xFFFF
    table[0], table[1], table[2] = 2, 0, 1
    for kind, items in ((MapKind.BITMAP, bitmap), (MapKind.TABLE, table)):
        pages = encode_pages(GEOMETRY, kind, items, THEIRS.uuid, 0, map_pages(GEOMETRY, kind))
        node.pwrite(map_offset_bytes(GEOMETRY, kind), pages)
    for sequence in range(2, 9):
        commit = encode_commit(
            GEOMETRY, THEIRS.uuid, sequence=sequence, previous=sequence - 1, tail=2, map_hash=7, words=[(0, 0xFFFF)], entries=[(1, 3)]
        )
        node.pwrite(page_offset_bytes(GEOMETRY, sequence), commit)


def our_disk(node: DeviceNode) -> None:
    write_disk(node, OURS)


def provision(scene: Scene) -> None:
    """As provision() does once it knows that it may: a disk that was there is gone before the new one begins to be."""
    scene.allowed |= {THEIRS.uuid}  # until its superblocks are durably gone
    write_disk(scene.node, OURS)
    scene.allowed = {OURS.uuid}
    scene.may_be_absent = False


def provision_over_holes(scene: Scene, layout: Layout = Layout.COMPACT) -> None:
    """Over a base with holes the disk has contents from the beginning."""
    scene.allowed |= {THEIRS.uuid}
    scene.ours = OVER_HOLES[layout]
    write_ours(scene.node, scene.ours)
    scene.allowed = {OURS.uuid}
    scene.may_be_absent = False


def provision_raw_over_holes(scene: Scene) -> None:
    provision_over_holes(scene, Layout.RAW)


def remove(scene: Scene) -> None:
    wipe_superblocks(scene.node)
    scene.allowed = set()


def extend(scene: Scene) -> None:
    """The size is all that changes; the disk opens at either."""
    scene.may_be_absent = False
    scene.node.flush()
    scene.device.grow(SIZE_BYTES + 65536, b"\xf0FOREIGN")
    scene.node.flush()


def open_with_one_superblock(scene: Scene) -> None:
    """A writable open puts a lost copy back, and never risks the other."""
    scene.may_be_absent = False
    disk = recover_disk(scene.node, read_only=False)
    notices: list[str] = []
    node: Any = scene.node
    node.identity = ("file", 1, 2)  # a log has a place that it belongs to
    _, log = begin_generation(node, disk, None, notices)
    log.close()
    if not any("superblock copy 1" in notice for notice in notices):
        raise Violation("a lost superblock was not noticed")


def one_superblock(node: DeviceNode) -> None:
    write_disk(node, OURS)
    node.zero(superblocks.SLOT_OFFSETS_BYTES[1], 4096)


CASES = (
    (nothing, provision),
    (zeros, provision),
    (their_disk, provision),
    (nothing, provision_over_holes),
    (their_disk, provision_over_holes),
    (nothing, provision_raw_over_holes),
    (their_disk, provision_raw_over_holes),
    (our_disk, remove),
    (our_disk, extend),
    (one_superblock, open_with_one_superblock),
)
# A minute and more each; with blocks of 4 KiB, and over another disk, they are in every run.
TAKE_LONG = {(nothing, provision_over_holes, 512), (nothing, provision_raw_over_holes, 512)}


@pytest.mark.parametrize(
    ("before", "scenario", "logical_block_bytes"),
    [
        pytest.param(
            *case, size, marks=pytest.mark.long if (*case, size) in TAKE_LONG else (), id=f"{case[0].__name__}-{case[1].__name__}-{size}"
        )
        for case in CASES
        for size in (4096, 512)
    ],
)
def test_power_fails_everywhere(before: Callable[[DeviceNode], None], scenario: Callable[[Scene], None], logical_block_bytes: int) -> None:
    size_bytes = RAW_GEOMETRY.max_storage_size_bytes if scenario is provision_raw_over_holes else SIZE_BYTES
    count = sweep(lambda: Scene(before, logical_block_bytes, size_bytes), scenario)
    print(f"{scenario.__name__}: {count.images} images at {count.points} points, at most {count.most_volatile} volatile blocks")
    assert count.points >= 2


def test_a_superblock_before_the_maps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VolatileNode, "flush", lambda node: None)
    with pytest.raises((Violation, Corrupt)):
        sweep(lambda: Scene(their_disk, 4096), provision)


def test_zeros_after_the_superblock_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The raw layout: places that are made zeros, but not durably, before the disk begins to be."""

    def late(scene: Scene) -> None:
        scene.ours = OVER_HOLES[Layout.RAW]
        places: list[tuple[int, int]] = []
        node = scene.node
        write_disk(node, scene.ours, zeros=ZEROS, punch=lambda *place: not places.append(place))
        for place in places:
            node.zero(*place)
        node.flush()

    with pytest.raises(Violation, match="what the storage held before"):
        sweep(lambda: Scene(nothing, 4096, RAW_GEOMETRY.max_storage_size_bytes), late)


def test_a_hash_of_empty_maps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision_module, "map_hash", lambda *_: 0)
    with pytest.raises((Violation, Corrupt), match="hash"):
        sweep(lambda: Scene(nothing, 4096), provision_over_holes)


def test_the_order_of_a_provision_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """All flushes are there, but the superblock comes before the maps."""

    def early(node: VolatileNode, superblock: Superblock) -> None:
        write_superblock(node, superblock)
        write_disk(node, superblock)

    def provision_early(scene: Scene) -> None:
        scene.allowed |= {THEIRS.uuid}
        early(scene.node, OURS)

    with pytest.raises((Violation, Corrupt)):
        sweep(lambda: Scene(nothing, 4096), provision_early)


def unclean(logical_block_bytes: int) -> Stage:
    """A disk whose process was killed: a commit is visible and volatile, data are written, nothing is closed."""
    stage = Stage(logical_block_bytes=logical_block_bytes)
    stage.now("write", 0, 8)
    stage.submit("flush")
    stage.finish_all(but=lambda op: op.kind == WRITE)
    stage.effect(*stage.pending())
    stage.device.kill()
    stage.player.abandon()
    stage.oracle.survive_kill()
    return stage


@pytest.mark.parametrize("logical_block_bytes", [4096, 512])
def test_power_fails_while_an_unclean_disk_is_opened(logical_block_bytes: int) -> None:
    """The open's own flush is a crash point too: at it and after it the disk is whole, and what was acknowledged is old or new."""

    class Opening:
        def __init__(self) -> None:
            self.stage = unclean(logical_block_bytes)
            self.device = self.stage.device
            self.budget = Budget()

        def judge(self) -> None:
            self.stage.open()
            self.stage.check()
            self.stage.oracle.check_after_crash(self.stage.read_all())

    def open_it(scene: Opening) -> None:
        recover_disk(VolatileNode(scene.device, scene.budget), read_only=False)

    count = sweep(Opening, open_it)
    assert count.points == 1 and count.images > 2


def test_half_a_removal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(scene: Scene) -> None:
        scene.node.pwrite(superblocks.SLOT_OFFSETS_BYTES[0], bytes(4096))
        scene.node.flush()
        scene.allowed = set()

    with pytest.raises(Violation, match="was to be gone"):
        sweep(lambda: Scene(our_disk, 4096), half)
