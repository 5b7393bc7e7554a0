# SPDX-License-Identifier: Apache-2.0
"""What one world looks like: sizes, layout, base, cache mode, load, faults. Drawn from its seed, and independent of what happens in it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fvd.format.geometry import Geometry, Layout, Placement
from fvd.modes import CACHE_MODES, DIRECT_CACHE_MODES, ON_FULL
from fvd.sim._device import CATEGORIES
from fvd.sim._rng import Rng

SECTOR_BYTES = 512
KIB = 1024
EIO, ENOSPC = -errno.EIO, -errno.ENOSPC
DRAWN = tuple(name for name in CATEGORIES if name != "zeroing")  # that has rng of its own: a seed keeps its world
STICKY = ("journal", "map", "flush")  # a failure there is remembered by the engine, and ends most of a life
SCALES = ("crowded", "tight", "tight", "scarce", "plain") * 3 + ("wide", "wide", "busy")
SECTORS_MAX = {"crowded": 512, "tight": 512, "scarce": 768, "plain": 4096, "wide": 32768, "busy": 1024, "coarse": 32768, "broad": 8}

Area = tuple[int, int]  # first sector, sectors
TOLD_ONCE = 0.7  # share of worlds


@dataclass(slots=True)
class Growth:
    """How a world's storage grows where the allocator grows it."""

    place: Literal["file", "group", "fixed"]
    """A file, that says nothing; a group, that tells of free space; a device, that only others can enlarge."""
    pace: Literal["fast", "slow", "slower"]
    """How long a step takes; with `slower` each longer than the one before."""
    trouble: float
    """Share of steps that fail, hang, stop half-way or say what is not so."""
    free_steps: int
    """What there is space for at first, in grow steps."""
    timeout_seconds: float
    """After this a step counts as slow."""
    low_water_chunks: int
    """The mark; 0: the usual one."""


@dataclass(slots=True)
class Shape:
    """A world's constants. Sizes in bytes, sectors (512 bytes) or chunks, as named."""

    geometry: Geometry
    base_bytes: int | None = None
    logical_block_bytes: int = 512
    cache_mode: str = "none"
    on_full: str = "wait"
    storage_chunks: int = 1
    surplus_bytes: int = 0
    """Storage beyond the last whole slot, and beyond what the disk can ever need: an extent or a file ends anywhere."""
    bounce_limit_bytes: int = 64 << 20
    low_water_chunks: int = 0
    discards_max: int = 8
    """Of them in flight at once, each of at most `discard_bytes`, all of `first_discard_bytes` at first."""
    discard_bytes: int = 32 << 20
    first_discard_bytes: int = 256 << 20
    request_window: int = 32
    """Operations and jobs that one request has under way at most."""
    discard: bool = False
    zero_chunks: bool = False
    """The engine lets the device zero new chunks."""
    device_zeroes: bool = True
    """The device can; else it says that it cannot, the first time that it is asked."""
    windows: list[Area] | None = None
    """The parts of a disk too large to be modelled whole that are used."""
    areas: list[Area] = field(default_factory=list)
    """Where requests fall."""
    kinds: Mapping[str, float] = field(default_factory=dict)
    """Weights of KINDS, before a round switches some off."""
    largest_sectors: int = 8
    depth: int = 1
    least_depth: int = 1
    """As many stay in flight while there are more to come."""
    longest_round: int = 1
    slow: Mapping[str, float] = field(default_factory=dict)
    """Share of events that come late, by category of the device's operations."""
    stuck_share: float = 0.0
    torn_share: float = 0.0
    """Of operations whose blocks do not all take effect at once."""
    overtaking_share: float = 0.0
    """Of the device's operations that take effect before those under way in the same place."""
    verify_share: float = 0.0
    """Of writes that are read again at once."""
    skew_share: float = 0.0
    """Of buffers that are not aligned."""
    faults: Mapping[str, float] = field(default_factory=dict)
    """Share of the device's operations that fail, by category."""
    told_once: bool = False
    """What could not be made durable is told to one of those who ask, and to nobody else."""
    fua: bool = True
    """Without a page cache: a durable write asks the device for nothing but its own blocks; else it is a write and a flush."""
    outsider: bool = False
    """With a page cache: somebody else has the same open file, and asks now and then."""
    writeback_share: float = 0.0
    """Of events at which the page cache loses pages by itself, while faults are on."""
    eviction_share: float = 0.0
    """Of events at which lost blocks are evicted, once there are any."""
    landing_share: float = 0.0
    """Of events at which failed operations reach the storage after all, once there are any."""
    impatient: bool = False
    """A server whose disk has failed is killed at the end of the round."""
    durable_writes: bool = True
    """A guest's durable write is one operation; else a plain write and then a flush."""
    fail_with: int = EIO
    fail_one: bool = False
    """One chosen operation of each life fails."""
    growth: Literal["ready", "late", "never"] = "ready"
    """Storage that is asked for comes at once, some time later, or only when everything else has ended."""
    allocator: Growth | None = None
    """The real allocator grows the storage instead."""
    steered: bool = False
    """The real steering prefetches instead of the rng."""
    crash_at: str = ""
    """The category of operation that crashes wait for; "": they wait for none."""
    copying: bool = False
    """Copies are made of the base: by reads, by prefetching, or both, as the rng say while it runs."""
    copy_on_read: bool = False
    """Always, whatever the rng say."""
    eager: bool = False
    """Whatever requests fall on is prefetched from the first moment on."""
    prefetch: bool = False
    """The whole base, always, whatever the guest does."""
    copy_limit_bytes: int = 8 << 20
    base_timeout_ns: int = 0
    resends: bool = False
    """The client sends again what a killed server has not answered."""
    ring: bool = False
    """Most requests go through a ring in a guest's memory, which outlives a server that is killed."""
    deaths: int = 0
    """As many at most die while they open a disk whose server was killed."""
    deadly: bool = False
    """Servers are killed rather than that power fails."""
    workers: int = 0
    """Of the device, for flushes, discards and zeroing: others queue. 0: as many as it takes."""
    log: bool = True
    """Changes that are pending are in a log that outlives the process."""
    short_log: bool = False
    """It is as small as a log may be."""
    advice: Mapping[str, float] = field(default_factory=dict)
    """Share of operations that fail, by category, and no guest may notice: discards."""
    commit_limit_bytes: int | None = None
    """What one commit may hold, where the journal would hold more: else only the largest loads wait for space."""
    settle_share: float = 0.0
    """Of rounds after which everything under way ends before the round's own end comes."""
    rot: bool = False
    """Metadata is damaged, lost, misplaced and forged where power has failed."""

    def __post_init__(self) -> None:
        if not self.areas:
            self.areas = self.windows or [(0, self.sectors)]

    @property
    def sectors(self) -> int:
        return self.geometry.virtual_size_bytes // SECTOR_BYTES

    @property
    def faulty(self) -> bool:
        return self.fail_one or any(self.faults.values())


def draw(rng: Rng) -> Shape:
    """A shape from the rng."""
    scale = rng.choice(SCALES)
    rare = rng.random()
    if rare < 0.1:
        return _draw_vast(rng)
    if rare < 0.123:
        return _draw_sparse(rng)
    if rare < 0.14:
        scale = "broad" if rare < 0.13 else "coarse"
    block = rng.choice((4, 4, 4, 8, 16, 16, 64, 64, 256, 1024)) * KIB
    chunk = max(block, rng.choice((64, 64, 64, 128, 256, 1024)) * KIB)
    # On a crowded disk requests meet each other all the time, on a tight one in the same few blocks; on a scarce one the few slots go from
    # chunk to chunk; on a wide one much has never been written, committed or checkpointed.
    virtual = rng.randint(8, SECTORS_MAX[scale]) * SECTOR_BYTES
    if scale in ("tight", "scarce", "wide"):
        block, chunk = min(block, 4 * KIB if scale == "tight" else 64 * KIB), 64 * KIB
    elif scale == "broad":
        # Enough to change at once that commits take several pages, the journal runs out of space, and a map has several pages.
        block, chunk = min(block, 64 * KIB), 64 * KIB
        virtual = rng.randint(80_000, 140_000) * SECTOR_BYTES
    elif scale == "coarse":
        chunk = rng.choice((2, 4)) << 20
    elif rng.random() < 0.3:
        virtual = rng.randint(1, max(1, virtual // chunk)) * chunk
    base = None
    if rng.random() < (0.2 if scale == "tight" else 0.5):
        base = rng.choice((virtual, virtual // 2, virtual + 12345, rng.randint(1, virtual), rng.randint(1, virtual // 512) * 512))
    geometry = Geometry(
        virtual_size_bytes=virtual,
        block_size_bytes=block,
        chunk_size_bytes=chunk,
        journal_size_bytes=rng.choice((16, 16, 16, 17, 23, 32)) * 4 * KIB,
        grow_step_bytes=max(chunk, rng.choice((64, 256, 256, 1024)) * KIB),
        layout=Layout.RAW if scale != "scarce" and rng.random() < 0.2 else Layout.COMPACT,
    )
    shape = _draw_load(rng, geometry, scale)
    shape.base_bytes = base
    sectors = shape.sectors
    if scale == "broad":
        # Changes gather while a flush takes long and hardly anyone asks for another.
        shape.kinds = dict(shape.kinds) | {"flush": 0.01, "fua": 0.0, "rewrite": 0.0, "trim": rng.choice((0.0, 0.5))}
        shape.cache_mode = rng.choice(("none", "writeback"))
        shape.slow = {rng.choice(("flush", "flush", "flush", "journal", "map")): 0.9}
        shape.stuck_share, shape.verify_share, shape.depth, shape.longest_round = 0.0, 0.0, 256, 4000
        shape.least_depth = rng.choice((1, 256, 256, 256))
        shape.storage_chunks, shape.low_water_chunks = max(shape.storage_chunks, geometry.chunks // 2), 0
    if scale == "busy":
        # Else the queue drains whenever the rng ask for a short one, and thousands are never in flight together.
        shape.least_depth, shape.longest_round = rng.choice((1, shape.depth // 2, shape.depth)), 2 * shape.depth
    if scale == "scarce":
        shape.storage_chunks = min(geometry.chunks, rng.choice((1, 1, 2)))
        shape.growth = rng.choice(("late", "never", "never"))
    if scale == "tight" or (scale not in ("wide", "broad") and rng.random() < 0.4):
        hot = min(sectors, rng.choice((16, 24, 32) if scale == "tight" else (16, 256, 1024)))
        shape.areas = [(rng.choice((0, rng.randint(0, sectors - hot), sectors - hot)), hot)]
    return shape


def draw_copying(shape: Shape, rng: Rng) -> None:
    """Whether and how the shape's disk is copied from its base. From rng of its own: it changes nothing else."""
    small = shape.windows is None
    if rng.random() < 0.2 if shape.base_bytes is not None else rng.random() < 0.7 or not small:
        return
    shape.copying = True
    shape.copy_limit_bytes = rng.choice((1 << 12, 1 << 16, 1 << 20, 8 << 20))
    shape.base_timeout_ns = rng.choice((0, 0, 300_000_000, 2_000_000_000))
    if rng.random() < 0.5:
        shape.slow = dict(shape.slow) | {"base": rng.choice((0.2, 0.8, 0.95))}
    if not small or (shape.base_bytes is not None and rng.random() < 0.2):
        return
    # A larger disk, mostly read, with space for copies: else everything has been copied or written before anything can happen to it.
    geometry = shape.geometry
    sectors = rng.randint(2000, 12000)
    block = rng.choice((4, 4, 8, 16, 64)) * KIB
    shape.geometry = replace(
        geometry,
        virtual_size_bytes=sectors * SECTOR_BYTES,
        block_size_bytes=block,
        chunk_size_bytes=rng.choice((64, 64, 128, 1024)) * KIB,
        grow_step_bytes=1 << 20,
    )
    shape.base_bytes = rng.choice((sectors * SECTOR_BYTES, sectors * SECTOR_BYTES + 4321, sectors * 256 + 77))
    chunks = shape.geometry.chunks
    whole = geometry.layout is Layout.RAW or rng.random() < 0.5
    shape.storage_chunks = chunks if whole else rng.randint(1, chunks)
    first = rng.randint(0, sectors - 600)
    shape.areas = rng.choice(([(0, sectors)], [(first, 600)], [(0, sectors), (first, 600)]))
    shape.kinds = dict(shape.kinds) | {"read": 4.0, "write": rng.choice((0.5, 2.0)), "flush": rng.choice((0.1, 0.2, 1.0))}
    rare = rng.random()
    if rare < 0.35:
        # What was copied, all of it, is then written here and there and flushed.
        shape.eager = True
        shape.areas = [(first, 600)]
        shape.kinds = {"read": 0.5, "write": 1.0, "flush": 1.0}
        shape.longest_round, shape.largest_sectors = min(shape.longest_round, 40), 8
    elif rare < 0.75:
        # Some blocks of a chunk are zeros by their bits when others are copied; they are read then, and seldom written.
        shape.geometry = replace(shape.geometry, block_size_bytes=4 * KIB, chunk_size_bytes=64 * KIB, layout=Layout.COMPACT)
        shape.storage_chunks = shape.geometry.chunks
        shape.copy_on_read = True
        shape.areas = [(0, 1920)]
        shape.kinds = {"read": 4.0, "write": rng.choice((0.2, 1.0)), "zero": 1.0, "flush": 0.3}
        shape.longest_round, shape.largest_sectors = max(40, min(shape.longest_round, 200)), 16
        shape.depth = rng.choice((4, 16))
    shape.faults = {name: rate for name, rate in shape.faults.items() if name not in STICKY}
    shape.crash_at = rng.choice(("", "journal", "map", "write", "flush"))
    shape.rot = False


def draw_growth(shape: Shape, rng: Rng) -> None:
    """Whether the allocator grows the disk's storage, and the steering its copies. From rng of its own: it changes nothing else."""
    geometry = shape.geometry
    grows = geometry.layout is Layout.COMPACT and shape.storage_chunks < geometry.chunks
    if rng.random() < (0.6 if grows else 0.1):
        shape.allocator = Growth(
            place=rng.choice(("file", "file", "group", "group", "fixed")),
            pace=rng.choice(("fast", "fast", "slow", "slower")),
            trouble=rng.choice((0.0, 0.1, 0.5)),
            free_steps=rng.choice((0, 1, 4, 1000, 1000)),
            timeout_seconds=rng.choice((0.01, 1.0, 30.0)),
            low_water_chunks=rng.choice((0, 0, 1, 2, 5)),
        )
    shape.steered = shape.copying and rng.random() < 0.5
    if shape.copying and geometry.layout is Layout.COMPACT and geometry.chunks > 8 and shape.windows is None and rng.random() < 0.6:
        # Copies and the guest have too little storage between them, and there is hardly more.
        shape.storage_chunks = rng.randint(4, geometry.chunks - 2)
        shape.allocator = Growth(
            place=rng.choice(("file", "group", "fixed")),
            pace="fast",
            trouble=0.0,
            free_steps=0,
            timeout_seconds=1.0,
            low_water_chunks=rng.choice((2, 4, 8)),
        )
        shape.kinds = dict(shape.kinds) | {"read": 1.0, "write": 2.0, "trim": 1.0, "flush": 0.3}
        shape.areas = [(0, shape.sectors)]
        shape.prefetch = True
        shape.longest_round = min(shape.longest_round, 80)


def draw_placement(shape: Shape, rng: Rng) -> None:
    """Where the disk's new chunks go. From rng of its own: it changes nothing else."""
    shape.geometry = replace(shape.geometry, placement=rng.choice((Placement.APPEND, Placement.SPREAD)))


def draw_zeroing(shape: Shape, rng: Rng) -> None:
    """Whether new chunks are zeroed by the device. From rng of its own: it changes nothing else."""
    if rng.random() < 0.3:
        return
    shape.zero_chunks = True
    shape.device_zeroes = rng.random() < 0.9
    shape.slow = dict(shape.slow) | {"zeroing": rng.choice((0.0, 0.3, 0.9))}
    if rng.random() < 0.3:
        shape.faults = dict(shape.faults) | {"write": 0.05, "zeroing": rng.choice((0.0, 0.3))}
    if not shape.crash_at and rng.random() < 0.2:
        shape.crash_at = "zeroing"


def draw_log(shape: Shape, rng: Rng) -> None:
    """Whether a killed process leaves a log of what was pending. From rng of its own: it changes nothing else."""
    shape.log = rng.random() < 0.9
    shape.short_log = rng.random() < 0.4


def draw_ring(shape: Shape, rng: Rng) -> None:
    """Whether there is a guest with a ring. From rng of its own: it changes nothing else."""
    shape.ring = rng.random() < 0.3
    if shape.ring and rng.random() < 0.6:
        shape.deadly = True  # what is in a ring is at stake when its server is killed


def draw_bounds(shape: Shape, rng: Rng) -> None:
    """How much of the device one request and the disk's discards may take at once. From rng of its own: it changes nothing else."""
    shape.request_window = rng.choice((32, 32, 32, 1, 2, 5))
    shape.discards_max = rng.choice((1, 1, 2, 8))
    shape.discard_bytes = rng.choice((1, 2, 3, 32)) * shape.geometry.chunk_size_bytes
    shape.first_discard_bytes = rng.choice((1, 4, 256)) * shape.geometry.chunk_size_bytes
    if not shape.discard or rng.random() < 0.5:
        return
    # Discards take long: slots gather that wait for theirs.
    shape.slow = dict(shape.slow) | {"discard": rng.choice((0.5, 0.9))}
    shape.kinds = dict(shape.kinds) | {"trim": max(shape.kinds.get("trim", 0.0), 0.5)}


def draw_weather(shape: Shape, rng: Rng) -> None:
    """How the storage fails, and what it does by itself. From rng of its own: it changes nothing else."""
    shape.told_once = rng.random() < TOLD_ONCE
    shape.fua = rng.random() < 0.3
    shape.outsider = rng.random() < 0.5 and shape.cache_mode not in DIRECT_CACHE_MODES
    shape.eviction_share = rng.choice((0.0, 0.02, 0.2, 0.2))
    shape.landing_share = rng.choice((0.0, 0.0, 0.001, 0.001, 0.01, 0.1))
    if shape.told_once and shape.faulty:
        shape.writeback_share = rng.choice((0.0, 0.001, 0.01))
    shape.impatient = rng.random() < 0.5
    shape.resends = True
    shape.deaths = rng.choice((0, 0, 1, 2))
    shape.deadly = rng.random() < 0.3
    if shape.landing_share and rng.random() < 0.2:
        shape.faults = dict(shape.faults) | {"journal": 0.2}
    if shape.copying:
        # A server that is killed between two commits: what was copied beside what is pending, and then written, is in the log alone.
        shape.deadly = rng.random() < 0.7
    shape.workers = rng.choice((0, 0, 1, 2, 4))
    if shape.workers and rng.random() < 0.5:
        shape.slow = dict(shape.slow) | {"discard": 0.9}
    if shape.told_once and rng.random() < 0.1:
        # Many at once that make something durable, of which one fails now and then.
        shape.faults = dict(shape.faults) | {"flush": 0.02, "write": 0.02}
        shape.kinds = dict(shape.kinds) | {"fua": 2.0, "flush": 1.0}
        shape.depth = max(shape.depth, 8)


def draw_durable(shape: Shape, rng: Rng) -> None:
    """How durable writes are made. From rng of its own: it changes nothing else."""
    shape.durable_writes = rng.random() < 0.6


def _draw_load(rng: Rng, geometry: Geometry, scale: str) -> Shape:
    wide, small = scale == "wide", scale not in ("plain", "coarse")
    kinds = {name: rng.choice((0.0, 1.0, 1.0, 3.0)) for name in ("read", "flush", "trim", "zero", "fua", "rewrite")}
    kinds["write"] = 3.0
    if wide:
        kinds["flush"] = 2.0
    elif scale == "tight":
        # Mostly writes to what is there, and reads that see their order; what changes the maps comes in between.
        kinds |= {"read": 3.0, "rewrite": 0.0, "trim": rng.choice((0.3, 0.5, 1.0))}
        kinds |= {name: rng.choice((0.0, 0.0, 0.3)) for name in ("zero", "flush")}
    elif scale == "scarce":
        kinds |= {"read": 2.0, "trim": 2.0, "flush": rng.choice((0.0, 0.3, 1.0))}
    chunks = geometry.chunks
    whole = geometry.layout is Layout.RAW or rng.random() < 0.4
    rate = rng.choice((0.0, 0.0, 0.0, 0.0, 0.02, 0.02, 0.2, 0.9))
    # What is remembered ends most of a life: rarer, or the rest would never be seen. Writes of maps are rare by themselves.
    faults = {name: rate * (0.1 if name in ("journal", "flush") else 1.0) for name in DRAWN if rng.random() < 0.4}
    if "map" in faults:
        faults["map"] = max(rate, 0.3)
    return Shape(
        geometry=geometry,
        logical_block_bytes=rng.choice((512, 512, 4096)),
        cache_mode=rng.choice(("none", "none", "none", *CACHE_MODES)),
        on_full=rng.choice(ON_FULL),
        storage_chunks=chunks if whole else rng.randint(1, chunks),
        surplus_bytes=rng.choice((0, 0, 0, 4096, geometry.chunk_size_bytes - 4096, 2 * geometry.chunk_size_bytes + 4096)),
        bounce_limit_bytes=rng.choice((1 << 16, 1 << 20, 64 << 20, 64 << 20)),
        low_water_chunks=rng.choice((0, 0, 2)),
        discard=rng.random() < 0.5,
        kinds=kinds,
        largest_sectors=rng.choice((8, 16) if small else (8, 32, 128, 512)),
        depth=rng.choice({"busy": (256, 1024, 4096), "crowded": (8, 16, 48), "tight": (4, 8, 16, 48)}.get(scale, (1, 4, 16, 48))),
        longest_round=rng.choice({"busy": (200, 1000, 2000), "tight": (40, 80, 200, 400)}.get(scale, (10, 20, 40, 40, 80, 80, 200, 500))),
        slow=_draw_slow(rng),
        stuck_share=rng.choice((0.0, 0.0, 0.02)),
        torn_share=rng.choice((0.0, 0.3)),
        overtaking_share=rng.choice((0.0, 0.5)),
        verify_share=rng.choice((0.0, 0.0, 0.5)) if scale != "tight" else 0.7,
        skew_share=rng.choice((0.0, 0.1)),
        faults=faults if rate else {},
        fail_with=rng.choice((EIO, EIO, ENOSPC)),
        fail_one=rng.random() < 0.1,
        growth=rng.choice(("ready", "ready", "late", "never")),
        crash_at=rng.choice(("map", "map", "journal") if wide else ("", "", *DRAWN)),
        rot=rng.random() < 0.4,
    )


def _draw_slow(rng: Rng) -> dict[str, float]:
    """All kinds of operations are slow now and then; in some worlds one kind mostly, so that everything else overtakes it."""
    slow = dict.fromkeys(DRAWN, rng.choice((0.0, 0.05, 0.2)))
    if rng.random() < 0.7:
        slow[rng.choice(("read", "write", "map", "map", *DRAWN))] = rng.choice((0.5, 0.9))
    return slow


def _draw_vast(rng: Rng) -> Shape:
    """A disk beyond 2 TiB of which a few places are used: numbers that are cut short somewhere lead to the wrong one of them."""
    virtual = rng.choice(((1 << 31) + 4096, (1 << 32) + 4096, (1 << 33) + 128, (1 << 33) + 128)) * SECTOR_BYTES
    virtual -= rng.randint(0, 7) * SECTOR_BYTES
    geometry = Geometry(
        virtual_size_bytes=virtual,
        block_size_bytes=rng.choice((256, 1024, 1024)) * KIB,
        chunk_size_bytes=4 << 20,
        journal_size_bytes=256 * KIB,
        grow_step_bytes=4 << 20,
    )
    shape = _draw_load(rng, geometry, "plain")
    sectors = shape.sectors
    window = 2048
    shape.windows = [(first, min(window, sectors - first)) for first in _corners(sectors, window)]
    shape.areas = shape.windows
    shape.storage_chunks = rng.randint(1, 4)
    shape.base_bytes = rng.choice((None, virtual, virtual // 2 + 777, (1 << 41) + 513))
    shape.longest_round = rng.choice((20, 80))
    shape.largest_sectors = rng.choice((8, 128))
    shape.rot = False
    return shape


def _draw_sparse(rng: Rng) -> Shape:
    """Places far apart on a disk of some gibibytes: dirty map pages have no dirty neighbours, so a checkpoint takes several turns."""
    chunk = rng.choice((64, 64, 1024)) * KIB
    block = rng.choice((4, 16, 64)) * KIB
    virtual = rng.randint(4, 16) << (30 if chunk == 64 * KIB else 33)
    geometry = Geometry(
        virtual_size_bytes=virtual,
        block_size_bytes=block if chunk == 64 * KIB else 64 * KIB,
        chunk_size_bytes=chunk,
        journal_size_bytes=64 * KIB,
        grow_step_bytes=chunk,
    )
    shape = _draw_load(rng, geometry, "crowded")
    window = chunk // SECTOR_BYTES * 2
    step = shape.sectors // 8 // window * window
    shape.windows = [(place * step, window) for place in range(8)]
    shape.areas = shape.windows
    shape.storage_chunks = rng.randint(1, 16)
    shape.base_bytes = rng.choice((None, None, virtual, virtual // 2 + 777))
    shape.crash_at = rng.choice(("", "map", "journal", "flush"))
    shape.longest_round = rng.choice((80, 200, 1000))
    shape.rot = False
    return shape


def _corners(sectors: int, window: int) -> list[int]:
    """First sectors of windows that do not overlap: the beginning, at powers of two, the end."""
    places = [0, *(1 << power for power in (22, 26, 31, 32)), sectors // window * window]
    return [place for place in sorted(set(places)) if place < sectors]
