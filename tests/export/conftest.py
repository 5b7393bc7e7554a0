# SPDX-License-Identifier: Apache-2.0
"""Servers for the tests of this folder; they end with their test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_running import Disks, Running


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    disks = Disks(tmp_path)
    yield disks
    for running in disks.running:
        running.close()
    for descriptor in disks.descriptors:
        os.close(descriptor)


@pytest.fixture(params=["io_uring", "blocking"])
def serve(request: pytest.FixtureRequest, disks: Disks) -> Callable[..., Running]:
    """disks.serve, once with each kind of device queue."""

    def make(*arguments: Any, **options: Any) -> Running:
        return disks.serve(*arguments, force_blocking=request.param == "blocking", **options)

    return make
