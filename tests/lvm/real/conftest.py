# SPDX-License-Identifier: Apache-2.0
"""What a test on the real machine may ask for. Sizes and options: the context managers of `real_devices.py`, over `pool.disk()`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import pytest
from real_devices import GIB, Group, NbdDisk, Pool, Server, served, volume_group


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with contextlib.closing(Pool(tmp_path_factory.mktemp("disks"))) as disks:
        yield disks


@pytest.fixture
def whole_disk(pool: Pool) -> Iterator[str]:
    with pool.disk() as device:
        yield device


@pytest.fixture
def spare_device(pool: Pool) -> Iterator[str]:
    """A second device, for vgextend."""
    with pool.disk() as device:
        yield device


@pytest.fixture
def make_group(pool: Pool) -> Iterator[Callable[..., Group]]:
    """`make_group(size=8 * GIB, disks=2, options=("--physicalextentsize", "1m"))`: a group for this test."""
    with ExitStack() as stack:

        def make(size: int = 20 * GIB, disks: int = 1, options: tuple[str, ...] = ()) -> Group:
            devices = [stack.enter_context(pool.disk()) for _ in range(disks)]
            return stack.enter_context(volume_group(*devices, size=size, options=options))

        yield make


@pytest.fixture
def group(make_group: Callable[..., Group]) -> Group:
    """A group of 20 GiB on one disk."""
    return make_group()


@pytest.fixture
def serving(tmp_path: Path) -> Callable[..., AbstractContextManager[Server]]:
    """`with serving("vg/lv", "--on-full", "error") as server`: a real `fvd-lv serve`."""
    return partial(served, folder=tmp_path)


@pytest.fixture
def nbd_disk() -> Callable[[Server], AbstractContextManager[NbdDisk]]:
    """`with nbd_disk(server) as disk`: a client that looks like fvd.Disk."""
    return lambda server: contextlib.closing(NbdDisk(server.uri))
