# SPDX-License-Identifier: Apache-2.0
"""Types of the closed loop of requests; see _load.pyx."""

from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

from fvd.disk._disk_thread import DiskThread
from fvd.disk.opening import OpenVolume

class LoadThread(DiskThread):
    """An open volume, driven by requests that are made up in its own thread. Made by `load`; closes the volume as a DiskThread does."""

    def __enter__(self) -> LoadThread: ...
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

def load(volume: OpenVolume, *, force_blocking: bool = False) -> LoadThread: ...
