# SPDX-License-Identifier: Apache-2.0
"""systemd/fvd@.service and .socket as they are, sandbox and all, run by a systemd in namespaces of its own: disks grow, crash, stop."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_devices import MIB, Group, run, size_bytes

import fvd

UNITS = Path(__file__).resolve().parents[3] / "systemd"
LOG = Path("/run/fvd-unit.log")
SYSTEMD = Path("/lib/systemd/systemd")
# What capabilities(7) calls them, by their numbers.
CAPABILITIES = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_DAC_READ_SEARCH": 2, "CAP_FOWNER": 3, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7,
    "CAP_IPC_LOCK": 14, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_NICE": 23, "CAP_SYS_RESOURCE": 24,
    "CAP_MKNOD": 27,
}  # fmt: skip
# Process 1 of the namespaces. Debian's own units are left alone: the target wants nothing, the unit has no default dependencies.
BOOT = """
set -e
mount -t proc proc /proc
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs tmpfs /usr/local/bin
mount -t tmpfs tmpfs /etc/systemd
mkdir -p /run/systemd/system/fvd@.service.d /run/systemd/system/fvd@.socket.d
printf '#!/bin/sh\\nPATH=$PATH:/usr/sbin:/sbin PYTHONPATH={path} exec {python} -m fvd.cli "$@"\\n' > /usr/local/bin/fvd-lv
chmod +x /usr/local/bin/fvd-lv
sed 's,/etc/fvd/%i.conf,/run/%i.conf,' {units}/fvd@.service > /run/systemd/system/fvd@.service
cp {units}/fvd@.socket /run/systemd/system/
printf '[Service]\\nStandardError=append:{log}\\n' > /run/systemd/system/fvd@.service.d/log.conf
for kind in service socket; do printf '[Unit]\\nDefaultDependencies=no\\n' > /run/systemd/system/fvd@.$kind.d/test.conf; done
printf '[Unit]\\nDefaultDependencies=no\\n' > /run/systemd/system/fvd-test.target
export container=fvd-test
exec {systemd} --system --unit=fvd-test.target --log-target=null --show-status=no
"""


@pytest.fixture(scope="module")
def inside() -> Iterator[list[str]]:
    """The words before a command that talks to that systemd."""
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        pytest.skip("systemd is not installed")
    values = {"log": LOG, "units": UNITS, "systemd": SYSTEMD, "python": sys.executable, "path": os.environ.get("PYTHONPATH", "")}
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
        print(LOG.read_text() if LOG.exists() else "")
    finally:
        for child in Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split():
            os.kill(int(child), 9)
        outer.wait()


READ_ONLY = ("/etc", "/usr", "/proc/sys", "/sys")


def is_writable(mounts: list[list[str]], path: str) -> bool:
    """Of several mounts at one path the one on which no other lies: kernels since 6.8 do not list them in that order."""
    here = [fields for fields in mounts if fields[4] == path]
    [top] = [fields for fields in here if fields[0] not in {other[1] for other in here}]
    return "rw" in top[5].split(",")


class Instance:
    """fvd@NAME, for this volume, with these options."""

    def __init__(self, inside: list[str], name: str, volume: str, options: str) -> None:
        self._inside = inside
        self.name = name
        Path(f"/run/{name}.conf").write_text(f"VOLUME={volume}\nOPTIONS={options}\n")

    def ctl(self, verb: str, kind: str = "service") -> None:
        run(*self._inside, "systemctl", verb, f"fvd@{self.name}.{kind}")

    def show(self, what: str) -> str:
        return run(*self._inside, "systemctl", "show", "--value", "--property", what, f"fvd@{self.name}")

    def io(self, *commands: str, export: str = "") -> str:
        """By qemu-io, through the socket."""
        uri = f"nbd+unix:///{export}?socket=/run/fvd/{self.name}.nbd"
        return run(*self._inside, "qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri)

    def wait(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not what():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.2)

    def check_sandbox(self) -> None:
        """The kernel's word for what the unit asks for."""
        pid = self.show("MainPID")
        status = dict(line.split(":\t", 1) for line in run(*self._inside, "cat", f"/proc/{pid}/status").splitlines())
        allowed = {
            word
            for words in re.findall(r"^CapabilityBoundingSet=(.*)$", (UNITS / "fvd@.service").read_text(), re.MULTILINE)
            for word in words.split()
        }
        wanted = sum(1 << CAPABILITIES[name] for name in allowed)
        for kind in ("CapBnd", "CapPrm", "CapEff"):
            assert int(status[kind], 16) == wanted, kind
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        mounts = [line.split() for line in run(*self._inside, "cat", f"/proc/{pid}/mountinfo").splitlines()]
        assert {path: is_writable(mounts, path) for path in READ_ONLY} == dict.fromkeys(READ_ONLY, False)


def test_the_unit_serves_a_disk_on_lvm(group: Group, inside: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FVD_RUNTIME_DIR", raising=False)  # the unit has none
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", grow_step="128M")
    unit = Instance(inside, "vm1", volume, "--cache none")
    unit.ctl("start")
    assert unit.show("ActiveState") == "active" and unit.show("StatusText") == f"serving {volume}"
    unit.check_sandbox()
    unit.io(*(f"write -P 7 {at}M 64M" for at in (0, 64, 128)), "flush")
    assert size_bytes(group.path("vm1")) > 192 * MIB, "no growth inside the sandbox"
    # Made larger by somebody else: udev tells, and nothing else does.
    run("lvextend", "--size", "+256m", group.path("vm1"))
    unit.wait(lambda: fvd.info(volume).storage_size == size_bytes(group.path("vm1")))
    run(*inside, "sh", "-c", f"kill -KILL {unit.show('MainPID')}")  # the shell's: procps may not be there
    unit.wait(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active")
    unit.io("read -P 7 128M 64M")
    unit.ctl("stop")
    assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("success", "0")
    row = group.volume("vm1")
    assert row is not None and row["lv_active"] == ""
    assert fvd.check(volume).clean


def test_the_socket_starts_the_unit_for_disks_in_home_and_tmp(inside: list[str]) -> None:
    """Files of a user's, in a folder that only he may enter; and in /tmp, which a private one would hide."""
    home, shared = Path("/home"), Path(tempfile.mkdtemp(dir="/tmp", prefix="fvd-unit-"))
    run("mount", "-t", "tmpfs", "tmpfs", home)
    run(*inside, "mount", "-t", "tmpfs", "tmpfs", home)
    try:
        for name, disk in {"home": home / "anna" / "vm.img", "tmp": shared / "vm.img"}.items():
            run(*inside, "install", "-d", "-m", "0700", "-o", "1000", disk.parent)
            base = disk.with_name("gold.raw")
            run(*inside, "sh", "-c", f"umask 077; head -c 64M /dev/zero | tr '\\0' '\\5' > {base}")
            run(*inside, "chown", "1000", base)
            words = ("--size", "1G", "--grow-step", "32M", "--journal-size", "1M", "--base", base)
            run(*inside, "fvd-lv", "provision", f"file:{disk}", *words)
            run(*inside, "chown", "1000", disk)  # so its base is opened by a child that has become this user
            unit = Instance(inside, name, f"file:{disk}", "--cache writeback")
            unit.ctl("start", "socket")
            assert unit.show("ActiveState") == "inactive"
            unit.io("write -P 9 0 48M", "flush", "read -P 9 0 48M", "read -P 5 48M 16M")
            assert int(run(*inside, "stat", "-c", "%s", disk)) > 48 * MIB, "no growth inside the sandbox"
            unit.check_sandbox()
            unit.ctl("stop")
            unit.ctl("stop", "socket")
            assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("success", "0")
            run(*inside, "fvd-lv", "check", f"file:{disk}")
    finally:
        run(*inside, "umount", home)
        run("umount", home)
        shutil.rmtree(shared)
