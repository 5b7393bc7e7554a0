# SPDX-License-Identifier: Apache-2.0
"""What anybody may ask of a disk's copying, within reason or not, and that guests wait for none of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
from fake_copying import FakeDisk

from fvd.api import copying
from fvd.api.opened import OpenedVerbs
from fvd.api.types import PrefetchOptions
from fvd.disk.opening import OpenVolume
from fvd.errors import InvalidArgument


@pytest.mark.parametrize(
    "options",
    [
        PrefetchOptions(rate_bytes=1 << 64),
        PrefetchOptions(rate_bytes=-1),
        PrefetchOptions(delay_s=1e308),
        PrefetchOptions(delay_s=float("nan")),
        PrefetchOptions(profile="/tmp/a\0b"),
    ],
)
def test_options_that_no_engine_can_hold_are_refused(options: PrefetchOptions) -> None:
    with pytest.raises(InvalidArgument):
        copying.checked_options(options)


def test_files_are_read_and_written_outside_the_loop() -> None:
    disk = FakeDisk()
    loops: list[int] = []

    def call(work: Callable[[], Any]) -> Any:
        def run() -> None:
            loops.append(threading.get_ident())
            results.append(work())

        results: list[Any] = []
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results[0]

    verbs = OpenedVerbs(cast(OpenVolume, disk), call)
    verbs.prefetch_start(profile="/tmp/p")
    verbs.profile_record("/tmp/p")
    assert disk.copying is not None
    assert disk.copying.found_in == [threading.get_ident()] * 2 and len(disk.copying.started) == 1 and len(loops) == 2


def test_a_name_of_a_profile_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        copying.profile_writer(cast(OpenVolume, FakeDisk()), "/tmp/a\0b")
