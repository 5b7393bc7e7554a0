# SPDX-License-Identifier: Apache-2.0
"""What a user chooses from, each list once: the engine, the API, the command line, the simulator and the tests take it from here.

Lowest layer: imports nothing of the project. A new mode is added here, and where it makes a difference.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

CacheMode = Literal["none", "writeback", "writethrough", "directsync", "unsafe"]
OnFull = Literal["wait", "error"]
Layout = Literal["compact", "raw"]
Placement = Literal["append", "spread"]
BaseFormat = Literal["raw", "nbd", "qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels"]
ExtentState = Literal["data", "base", "zero"]

CACHE_MODES: Final[tuple[CacheMode, ...]] = get_args(CacheMode)
# A mode is what these three say of it.
DIRECT_CACHE_MODES: Final[tuple[CacheMode, ...]] = ("none", "directsync")  # past the page cache
WRITE_THROUGH_CACHE_MODES: Final[tuple[CacheMode, ...]] = ("writethrough", "directsync")  # a write is durable when it is answered
UNSAFE_CACHE_MODES: Final[tuple[CacheMode, ...]] = ("unsafe",)  # a guest's flush is answered, and nothing is flushed for it
ON_FULL: Final[tuple[OnFull, ...]] = get_args(OnFull)
LAYOUTS: Final[tuple[Layout, ...]] = get_args(Layout)
PLACEMENTS: Final[tuple[Placement, ...]] = get_args(Placement)
BASE_FORMATS: Final[tuple[BaseFormat, ...]] = get_args(BaseFormat)

# What --help says of them.
CACHE_HELP = """as in QEMU. none (default): O_DIRECT, flushed when the guest flushes; writeback: the same through
the page cache; writethrough, directsync: every acknowledged write is durable, with and without the page cache;
unsafe: ignores guest flushes, so a crash of the host may lose data"""
