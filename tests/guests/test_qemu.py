# SPDX-License-Identifier: Apache-2.0
"""A QEMU machine with four processors, whose disk with four queues is served to it by vhost-user: everything short of the server's death.

The tests share the machine, and run in this order. SeaBIOS has used the disk before the machine's own kernel does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from guest_server import GuestServer
from qemu_machine import Machine, Maker, disk, load_ends_well, load_steadily

pytestmark = [pytest.mark.release_only, pytest.mark.slow]

MIB = 1 << 20
QUEUES = 4
MOUNT = "mount /dev/vda /mnt"
UNMOUNT = "umount /mnt"
DROP_CACHES = "echo 3 >/proc/sys/vm/drop_caches"
CHECK_FILES = f"{DROP_CACHES}\ncd /mnt && md5sum -c -s sums && cd / || {{ cd / ; false ; }}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestServer]:
    with GuestServer(tmp_path_factory.mktemp("server"), 1024 * MIB, queues=QUEUES) as server:
        yield server
        server.stop()


@pytest.fixture(scope="module")
def machine(server: GuestServer, machines: Maker) -> Iterator[Machine]:
    words = ["-device", "pcie-root-port,id=below,chassis=1", *disk(server.socket, queues=QUEUES, more=",bus=below")]
    with machines.machine("qemu", *words, processors=4, more_memory=",slots=2,maxmem=1G") as machine:
        machine.wait_for_shell()
        yield machine


def wait_until(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_all_queues_are_used(machine: Machine) -> None:
    assert machine.run("ls /sys/block/vda/mq").split() == ["0", "1", "2", "3"]
    load_steadily(machine)
    time.sleep(2)
    load_ends_well(machine)
    calls = re.findall(r"^ *\d+:((?: +\d+)+) .*virtio\d+-req\.\d+", machine.run("cat /proc/interrupts"), re.MULTILINE)
    assert len(calls) == QUEUES and all(sum(map(int, line.split())) > 100 for line in calls), calls


def test_files(machine: Machine, server: GuestServer) -> None:
    """They are there when the page cache is gone; what is trimmed gives its chunks back."""
    machine.run("/e2fs/mke2fs -q -F -t ext4 /dev/vda")
    machine.run(MOUNT)
    machine.run("cd /mnt\nfor n in 1 2 3 4 ; do dd if=/dev/urandom of=$n bs=1M count=4 ; done\nmd5sum 1 2 3 4 >sums\ncd /\nsync")
    machine.run(CHECK_FILES)
    before = server.mapped_bytes
    machine.run("rm /mnt/1 /mnt/2\nsed -i '1,2d' /mnt/sums\nsync\nfstrim /mnt")
    assert before - server.mapped_bytes >= 6 * MIB
    machine.run(CHECK_FILES)
    machine.run(UNMOUNT)
    machine.run("/e2fs/e2fsck -fn /dev/vda")


def test_memory_that_is_plugged_while_requests_are_under_way(machine: Machine) -> None:
    """QEMU tells the server of it (ADD_MEM_REG), and of its going. What the disk reads into the page cache lies there first."""
    machine.run(MOUNT)
    load_steadily(machine, "/mnt/load")
    machine.qmp.do("object-add", **{"qom-type": "memory-backend-memfd"}, id="more", size=256 * MIB, share=True)
    machine.qmp.do("device_add", driver="pc-dimm", id="dimm", memdev="more")
    offline = "grep -l offline /sys/devices/system/memory/memory*/state"
    wait_until(lambda: "memory" in machine.run(f"{offline} || true"))
    machine.run(f"for state in $({offline}) ; do echo online_movable >$state ; done")
    machine.run("dd if=/dev/urandom of=/mnt/5 bs=1M count=8\nmd5sum /mnt/5 >>/mnt/sums")
    machine.run(CHECK_FILES)
    zones = machine.run("cat /proc/zoneinfo")
    found = re.search(r"zone +Movable\n +pages free +(\d+)\n(?:.*\n)*? +managed +(\d+)\n", zones)
    assert found is not None and (int(found[2]) - int(found[1])) * 4096 >= 8 * MIB, (
        "what was read does not lie in the memory that was plugged"
    )
    machine.run(DROP_CACHES)
    machine.run("for at in /sys/devices/system/memory/memory* ; do grep -q Movable $at/valid_zones && echo offline >$at/state ; done\ntrue")
    machine.qmp.do("device_del", id="dimm")
    wait_until(lambda: machine.qmp.do("query-memory-devices") == [])
    machine.run(CHECK_FILES)
    load_ends_well(machine)


def test_a_machine_that_is_paused(machine: Machine) -> None:
    """QEMU takes the rings away from the server (GET_VRING_BASE) and gives them back where they were."""
    load_steadily(machine, "/mnt/load")
    for _ in range(5):
        machine.qmp.do("stop")
        time.sleep(0.1)
        machine.qmp.do("cont")
        time.sleep(0.2)
    load_ends_well(machine)
    machine.run(CHECK_FILES)


def test_a_disk_that_is_unplugged_and_plugged_again(machine: Machine) -> None:
    machine.run(UNMOUNT)
    machine.qmp.do("device_del", id="disk")
    wait_until(lambda: "vda" not in machine.run("ls /sys/block"))
    device = {"driver": "vhost-user-blk-pci", "id": "disk", "bus": "below", "chardev": "disk-server", "num-queues": QUEUES}
    wait_until(lambda: "error" not in machine.qmp.answer("device_add", **device))
    wait_until(lambda: "vda" in machine.run("ls /sys/block"))
    machine.run(MOUNT)
    machine.run(CHECK_FILES)


def test_a_machine_that_is_reset_under_load(machine: Machine) -> None:
    machine.run("sync")
    load_steadily(machine, "/mnt/load")
    machine.qmp.do("system_reset")
    machine.wait_for_shell()
    machine.run(MOUNT)
    machine.run(CHECK_FILES)
    machine.run(UNMOUNT)
    machine.run("/e2fs/e2fsck -fn /dev/vda")
