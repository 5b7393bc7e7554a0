"""systemd/fvd@.service as it is, sandbox and all, run by a systemd in namespaces of its own: a disk on LVM grows, crashes, stops."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_devices import MIB, Group, run, size_bytes

import fvd

UNIT = Path(__file__).resolve().parents[3] / "systemd" / "fvd@.service"
SYSTEMD = Path("/lib/systemd/systemd")
URI = "nbd+unix:///?socket=/run/fvd/vm1.nbd"
# Process 1 of the namespaces. Debian's own units are left alone: the target wants nothing, the unit has no default dependencies.
BOOT = """
set -e
mount -t proc proc /proc
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs tmpfs /usr/local/bin
mount -t tmpfs tmpfs /etc/systemd
mkdir -p /run/systemd/system/fvd@.service.d
printf '#!/bin/sh\\nPATH=$PATH:/usr/sbin:/sbin PYTHONPATH={path} exec {python} -m fvd.cli "$@"\\n' > /usr/local/bin/fvd-lv
chmod +x /usr/local/bin/fvd-lv
printf 'VOLUME={volume}\\nOPTIONS=--cache none\\n' > /run/vm1.conf
sed 's,/etc/fvd/%i.conf,/run/%i.conf,' {unit} > /run/systemd/system/fvd@.service
printf '[Unit]\\nDefaultDependencies=no\\n' > /run/systemd/system/fvd@.service.d/test.conf
printf '[Unit]\\nDefaultDependencies=no\\n' > /run/systemd/system/fvd-test.target
export container=fvd-test
exec {systemd} --system --unit=fvd-test.target --log-target=null --show-status=no
"""


@contextlib.contextmanager
def systemd(volume: str) -> Iterator[list[str]]:
    """The words before a command that talks to that systemd."""
    values = {"volume": volume, "unit": UNIT, "systemd": SYSTEMD, "python": sys.executable, "path": os.environ.get("PYTHONPATH", "")}
    script = BOOT.format(**{name: shlex.quote(str(value)) for name, value in values.items()})
    outer = subprocess.Popen(["unshare", "-m", "-p", "-f", "-u", "--propagation", "private", "sh", "-c", script])
    try:
        deadline = time.monotonic() + 60
        inside: list[str] = []
        while not inside or subprocess.run([*inside, "systemctl", "show"], capture_output=True, check=False).returncode:
            assert outer.poll() is None and time.monotonic() < deadline, "systemd does not come up"
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            inside = ["nsenter", "-t", children[0], "-m", "-p", "-u"] if children else []
            time.sleep(0.2)
        yield inside
    finally:
        for child in Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split():
            os.kill(int(child), 9)
        outer.wait()


def test_the_unit_serves_a_disk_on_lvm(group: Group) -> None:
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        pytest.skip("systemd is not installed")
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", grow_step="128M")
    with systemd(volume) as inside:

        def show(what: str) -> str:
            return run(*inside, "systemctl", "show", "--value", "--property", what, "fvd@vm1")

        run(*inside, "systemctl", "start", "fvd@vm1")
        assert show("ActiveState") == "active" and show("StatusText") == f"serving {volume}"
        run(*inside, "qemu-io", "-f", "raw", *(word for at in (0, 64, 128) for word in ("-c", f"write -P 7 {at}M 64M")), "-c", "flush", URI)
        assert size_bytes(group.path("vm1")) > 192 * MIB, "no growth inside the sandbox"
        run(*inside, "kill", "-KILL", show("MainPID"))
        deadline = time.monotonic() + 60
        while not (show("NRestarts") == "1" and show("ActiveState") == "active"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run(*inside, "qemu-io", "-f", "raw", "-c", "read -P 7 128M 64M", URI)
        run(*inside, "systemctl", "stop", "fvd@vm1")
        assert (show("Result"), show("ExecMainStatus")) == ("success", "0")
    row = group.volume("vm1")
    assert row is not None and row["lv_active"] == ""
    assert fvd.check(volume).clean
