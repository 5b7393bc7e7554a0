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
DIRECT_CACHE_MODES: Final[tuple[CacheMode, ...]] = ("none", "directsync")  # past the page cache
WRITE_THROUGH_CACHE_MODES: Final[tuple[CacheMode, ...]] = ("writethrough", "directsync")  # a write is durable when it is answered
ON_FULL: Final[tuple[OnFull, ...]] = get_args(OnFull)
LAYOUTS: Final[tuple[Layout, ...]] = get_args(Layout)
PLACEMENTS: Final[tuple[Placement, ...]] = get_args(Placement)
BASE_FORMATS: Final[tuple[BaseFormat, ...]] = get_args(BaseFormat)
