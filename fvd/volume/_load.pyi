# SPDX-License-Identifier: Apache-2.0
"""Types of the closed loop of requests; see _load.pyx."""

from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

from fvd.volume._driver import Driver
from fvd.volume.opening import OpenVolume

class LoadDriver(Driver):
    """An open volume, driven by requests that are made up in its own thread. Made by `load`; closes the volume as a Driver does."""

    def __enter__(self) -> LoadDriver: ...
    def run(
        self,
        *,
        write: bool,
        block_bytes: int,
        depth: int,
        random: bool = True,
        offset_bytes: int = 0,
        length_bytes: int | None = None,
        requests: int = 0,
        seconds: float = 0.0,
        seed: int = 1,
        times_ns: Buffer | None = None,
    ) -> tuple[int, float]: ...

def load(volume: OpenVolume, *, force_blocking: bool = False) -> LoadDriver: ...
