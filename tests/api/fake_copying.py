# SPDX-License-Identifier: Apache-2.0
"""A disk over a base that is none: what the API asks of an open disk, its engine and its `copying`, remembered instead of done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

MIB = 1 << 20
BASE_BYTES = 100 * MIB
DISK_BYTES = 64 * MIB  # smaller than its base: only so much of that can ever be needed


@dataclass
class FakeEngine:
    want: int = 0
    free_slots: int = 7
    storage_size_bytes: int = 10 * MIB
    failed_errno: int = 0
    base_remaining_bytes: int = 24 * MIB
    base_released: bool = False
    base_failing: bool = False


@dataclass
class FakeCopying:
    started: list[Any] = field(default_factory=list)  # options
    wants: list[int] = field(default_factory=list)
    found_in: list[int] = field(default_factory=list)  # threads that dealt with files
    state: str = "running"
    on: bool = False
    released: bool = False

    def find_profile(self, options: Any) -> str:
        self.found_in.append(threading.get_ident())
        return f"found for {options.profile}"

    def start(self, options: Any, found: Any) -> None:
        assert found == f"found for {options.profile}"
        self.started.append(options)

    def stop(self) -> None:
        self.state = "off"

    def set_copy_on_read(self, on: bool) -> None:
        self.on = on

    def on_want(self, wants: int) -> None:
        self.wants.append(wants)

    def profile_writer(self, path: str | None) -> Callable[[], dict[str, Any]]:
        def write() -> dict[str, Any]:
            self.found_in.append(threading.get_ident())
            return {"path": path or "/srv/base.fvd-profile", "extents": 3, "bytes": 12288}

        return write

    def status(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "reason": "",
            "copy_on_read": self.on,
            "base_bytes": DISK_BYTES,
            "copied_bytes": 40 * MIB,
            "remaining_bytes": 24 * MIB,
            "bytes_per_second": 1.5 * MIB,
            "limit_bytes_per_second": None,
            "eta_seconds": 16.0,
            "resume_seconds": None,
            "profile": None,
            "profile_remaining_bytes": 0,
            "released": self.released,
        }


class FakeDisk:
    """`base`: made over one. Writable over a base that is still needed it has a `copying`, as a real one."""

    def __init__(self, *, base: bool = True, read_only: bool = False, released: bool = False) -> None:
        self.name = "file:/srv/vm1.img"
        self.engine = FakeEngine()
        self.geometry = SimpleNamespace(virtual_size_bytes=DISK_BYTES, chunk_size_bytes=MIB, block_size_bytes=65536)
        reference = SimpleNamespace(size_bytes=BASE_BYTES, locator="/srv/base.raw")
        self.superblock = SimpleNamespace(base=reference if base else None, copy_on_read=True, prefetch=True)
        self.read_only = read_only
        self.allocator = None
        self.base = SimpleNamespace(fd=3, remote=None) if base and not released else None
        self.base_released = released
        self.loss = None
        self.failing = None
        self.holding = None
        self.copying = FakeCopying() if base and not released and not read_only else None
        self.trace: list[str] = []

    def release_base(self) -> None:
        self.trace.append("disk")
        self.base, self.base_released = None, True
