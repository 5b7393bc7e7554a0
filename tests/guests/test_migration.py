# SPDX-License-Identifier: Apache-2.0
"""A machine moves to another QEMU on this host, where the same server serves it: what that writes to its memory meanwhile goes along."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guest_server import GuestServer
from qemu_machine import Machine, Maker, disk, load_ends_well, load_steadily

pytestmark = [pytest.mark.release_only, pytest.mark.slow]

MIB = 1 << 20
QUEUES = 2
SECONDS_MAX = 60


def test_a_machine_moves_under_load(machines: Maker, tmp_path: Path) -> None:
    words = disk(tmp_path / "vhost.sock", queues=QUEUES)
    place = f"unix:{tmp_path / 'migration'}"
    with GuestServer(tmp_path, 256 * MIB, queues=QUEUES) as server:
        with (
            machines.machine("before", *words, processors=2) as before,
            machines.machine("after", *words, "-incoming", place, processors=2) as after,
        ):
            before.wait_for_shell()
            before.run("/e2fs/mke2fs -q -t ext4 /dev/vda\nmount /dev/vda /mnt")
            before.run("dd if=/dev/urandom of=/mnt/file bs=1M count=12\nmd5sum /mnt/file >/mnt/sum\nsync\necho 3 >/proc/sys/vm/drop_caches")
            load_steadily(before, "/mnt/load")
            # It does not end by itself: what changes is more than can be sent in that time.
            before.run("while [ ! -e /tmp/stop ] ; do dd if=/dev/zero of=/tmp/changing bs=1M count=8 conv=notrunc ; done >/tmp/said 2>&1 &")
            before.qmp.do("migrate-set-parameters", **{"max-bandwidth": 16 * MIB, "downtime-limit": 1})
            before.qmp.do("migrate", uri=place)
            wait_for(before, lambda told: told["status"] == "active" and told["ram"]["dirty-sync-count"] > 1)  # all memory is there once
            before.run("cat /mnt/file >/dev/null")  # what the server writes now must be sent again
            before.qmp.do("migrate-set-parameters", **{"max-bandwidth": 1024 * MIB, "downtime-limit": 2000})
            wait_for(before, lambda told: told["status"] == "completed")
            assert before.qmp.do("query-status")["status"] == "postmigrate"
            after.run("md5sum -c -s /mnt/sum")  # of the page cache, which came along
            load_ends_well(after)
            after.run("umount /mnt\n/e2fs/e2fsck -fn /dev/vda")
        server.stop()


def wait_for(machine: Machine, is_so: Callable[[dict[str, Any]], bool]) -> None:
    """Of a migration."""
    end = time.monotonic() + SECONDS_MAX
    while not is_so(told := machine.qmp.do("query-migrate")):
        assert told["status"] in ("setup", "active", "device") and time.monotonic() < end, told
        time.sleep(0.1)
