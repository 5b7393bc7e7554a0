# SPDX-License-Identifier: Apache-2.0
"""A User-Mode Linux guest, whose kernel has another driver of vhost-user than QEMU is: file systems on a disk that is served to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from guest_server import GuestServer

pytestmark = [pytest.mark.release_only, pytest.mark.slow]

MIB = 1 << 20
DISK_BYTES = 1 << 30
FILES_MIB = 48
SCRIPT = """
set -e
mkdir -p /run/mounted
for kind in ext4 xfs; do
    case $kind in ext4) mkfs.ext4 -q /dev/vda;; xfs) mkfs.xfs -q -f /dev/vda;; esac
    mount /dev/vda /run/mounted
    pause $kind-empty
    for number in 1 2 3; do head -c FILE_BYTES /dev/urandom >/run/mounted/$number; done
    sync
    (cd /run/mounted && sha256sum 1 2 3) >/run/sums
    echo 3 >/proc/sys/vm/drop_caches
    (cd /run/mounted && sha256sum -c --quiet /run/sums)
    pause $kind-full
    rm /run/mounted/1 /run/mounted/2
    sync
    fstrim /run/mounted
    pause $kind-trimmed
    echo 3 >/proc/sys/vm/drop_caches
    (cd /run/mounted && grep ' 3$' /run/sums | sha256sum -c --quiet)
    umount /run/mounted
    case $kind in ext4) e2fsck -fn /dev/vda;; xfs) xfs_repair -n /dev/vda;; esac
done
""".replace("FILE_BYTES", str(FILES_MIB * MIB // 3))


def test_file_systems(tmp_path: Path) -> None:
    """Files are there when the page cache is gone, and what is trimmed gives its chunks back."""
    from uml_guest import run_guest

    mapped: dict[str, int] = {}
    with GuestServer(tmp_path, DISK_BYTES) as server:

        def note(name: str) -> None:
            mapped[name] = server.mapped_bytes

        run_guest(tmp_path, server.socket, SCRIPT, memory="256M", timeout_seconds=120, on_pause=note)
        for kind in ("ext4", "xfs"):
            written, trimmed = (mapped[f"{kind}-{when}"] for when in ("full", "trimmed"))
            assert written >= mapped[f"{kind}-empty"] + FILES_MIB * MIB
            assert written - trimmed >= FILES_MIB * MIB // 2, "two of three files gave their chunks back, but for the ends of extents"
        server.stop()
