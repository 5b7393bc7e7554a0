# SPDX-License-Identifier: Apache-2.0
"""The life of the Debian package on a bare Debian with systemd: installed, serves disks, upgraded under a guest, removed, purged.

Runs as root on a machine that can be thrown away, with that machine's own Python and nothing of this tree but the packages it is given:
    python3 package_story.py OLDER.deb NEWER.deb /dev/EMPTY [WHEEL PIP]
The guest is QEMU's block layer, as `fvd-lv attach-info` says it is to be connected. With a wheel (and the folder of a
pip) the package makes way for that at the end, in a virtual environment, on a machine without libnbd.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

DISK = "vg0/vm1"
UNIT = "fvd@vm1.service"
DECOY = Path("/usr/local/bin/fvd-lv")
BLOCK = 4096
# A restart and an upgrade are the same for a guest; this much more is for chance, on a machine with one slow processor.
SLACK_SECONDS = 3.0
# What dpkg, lvm2, systemd and Python write on their own account.
NOT_OURS = re.compile(
    r"/(dev|proc|sys|run|tmp|boot|fvd-guest)\b|/var/(log|cache|lib/dpkg|lib/systemd|lib/apt|lib/lvm|tmp)\b|/etc/lvm\b|.*/__pycache__\b"
    r"|/etc/(machine-id|\.pwd\.lock|ld\.so\.cache|mtab)$|/srv\b|/root\b"
)


def run(*words: str, code: int = 0) -> str:
    """What a command says, both streams; it must end with this exit code."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", encoding="utf-8", check=False)
    assert done.returncode == code, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGUN:6.1f} s] {text}", flush=True)


def until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def show(what: str, unit: str = UNIT) -> str:
    return run("systemctl", "show", "--value", "--property", what, unit).strip()


def served_by() -> list[str]:
    """The command line of the server."""
    return Path(f"/proc/{show('MainPID')}/cmdline").read_text().split("\0")


def away_seconds() -> float:
    """From the last time that the server was told to end until it served again."""
    return (int(show("ActiveEnterTimestampMonotonic")) - int(show("ActiveExitTimestampMonotonic"))) / 1e6


def starts() -> int:
    return run("journalctl", "--no-pager", "--output=cat", "--unit", UNIT).count("Started fvd@vm1.service")


def install(package: str) -> str:
    return run("dpkg", "--force-unsafe-io", "--install", package)


def files() -> set[str]:
    """All there is, but what changes by itself."""
    found: set[str] = set()
    for folder, folders, names in os.walk("/"):
        prefix = folder.rstrip("/")
        folders[:] = [name for name in folders if not NOT_OURS.match(path := f"{prefix}/{name}") and not os.path.ismount(path)]
        found.update(path for name in [*folders, *names] if not NOT_OURS.match(path := f"{prefix}/{name}"))
    return found


class Guest:
    """Writes a block after the other, each durable before the next, until it is told to end. A request may wait, and must not fail."""

    def __init__(self) -> None:
        blockdev = json.loads(run("fvd-lv", "--output", "json", "attach-info", DISK))["blockdev"]
        words = ["qemu-io", f"json:{json.dumps({'driver': 'raw', 'file': blockdev})}"]
        self._client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        self._stop = False
        self._pauses: list[tuple[float, float]] = []  # when a request began, and how long it took
        self.failure = ""
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        while not self._stop and not self.failure:
            begun, number = time.monotonic(), len(self._pauses)
            self._ask(f"write -f -P {self._pattern(number)} {number * BLOCK} {BLOCK}", f"wrote {BLOCK}/{BLOCK}")
            self._pauses.append((begun, time.monotonic() - begun))
            time.sleep(0.02)

    def _ask(self, command: str, answer: str) -> None:
        assert self._client.stdin is not None and self._client.stdout is not None
        self._client.stdin.write(f"{command}\n")
        self._client.stdin.flush()
        said = self._client.stdout.readline()
        if answer not in said:
            self.failure = f"{command}: {said.strip() or 'no answer'}"
        self._client.stdout.readline()  # how long it took

    @staticmethod
    def _pattern(number: int) -> int:
        return number % 251 + 1

    def longest_pause_during(self, do: Callable[[], object]) -> float:
        until(lambda: len(self._pauses) > 5 or self.failure != "", "the guest does not begin")
        begun = time.monotonic()
        do()
        ended, count = time.monotonic(), len(self._pauses)
        until(lambda: len(self._pauses) > count + 5 or self.failure != "", "the guest does not go on", 150)
        assert not self.failure, f"a request of the guest failed: {self.failure}"
        # Of requests that were under way at some moment of it.
        return max(took for at, took in self._pauses if at + took > begun and at < ended)

    def end(self) -> int:
        """How many blocks it has written; all of them are there."""
        self._stop = True
        self._thread.join()
        for number in range(len(self._pauses)):
            self._ask(f"read -P {self._pattern(number)} {number * BLOCK} {BLOCK}", f"read {BLOCK}/{BLOCK}")
        assert not self.failure, f"a request of the guest failed: {self.failure}"
        self._client.communicate("quit\n")
        return len(self._pauses)


def the_package_is_whole(version: str) -> None:
    assert run("fvd-lv", "--version") == f"fvd-lv {version}\n"
    # Of the library, for Python's tools.
    assert Path(f"/usr/lib/python3/dist-packages/fvd-{version}.dist-info").is_dir()
    listed = run("dpkg", "--listfiles", "fvd").split()
    for name in (
        *("/usr/bin/fvd-lv", "/etc/fvd", "/usr/share/man/man1/fvd-lv.1.gz", "/usr/share/man/man5/fvd.5.gz"),
        *("/usr/share/bash-completion/completions/fvd-lv.bash", "/usr/share/zsh/vendor-completions/_fvd-lv"),
        *("/usr/share/doc/fvd/copyright", "/usr/share/doc/fvd/examples/vm1.conf"),
    ):
        assert name in listed, f"{name} is not in the package"
    needed, wanted = run("dpkg-query", "--showformat=${Depends}\n${Recommends}", "--show", "fvd").split("\n")
    for name in ("python3-numpy (>= 1:1.24)", "python3-pyudev (>= 0.24)", "libnbd0", "python3 (>= 3."):
        assert name in needed
    assert wanted == "lvm2 (>= 2.03.12)"


def it_serves(device: str) -> None:
    run("vgcreate", "vg0", device)
    run("fvd-lv", "provision", DISK, "--size", "1G", "--grow-step", "128M")
    Path("/etc/fvd/vm1.conf").write_text(f"VOLUME={DISK}\nOPTIONS=--cache none\n")
    run("systemctl", "enable", "--now", "fvd@vm1")
    assert (show("ActiveState"), show("StatusText")) == ("active", f"serving {DISK}")
    # And one that waits for its first connection.
    run("fvd-lv", "provision", "vg0/vm2", "--size", "256M")
    Path("/etc/fvd/vm2.conf").write_text("VOLUME=vg0/vm2\nOPTIONS=\n")
    run("systemctl", "enable", "--now", "fvd@vm2.socket")


def the_upgrade_is_a_restart(newer: str) -> None:
    guest = Guest()
    restart_pause = guest.longest_pause_during(lambda: run("systemctl", "restart", UNIT))
    restart_seconds = away_seconds()
    # From now on something of that name is earlier in everyone's PATH. The unit runs what its package has installed.
    DECOY.write_text("#!/bin/sh\nexit 99\n")
    DECOY.chmod(0o755)
    said = ""

    def upgrade() -> None:
        nonlocal said
        said = install(newer)

    upgrade_pause = guest.longest_pause_during(upgrade)
    upgrade_seconds = away_seconds()
    say(f"the server was away for {restart_seconds:.2f} s in a restart, for {upgrade_seconds:.2f} s in the upgrade")
    say(f"the guest's longest pause {restart_pause:.2f} s, {upgrade_pause:.2f} s: QEMU looks for it after 1, 3, 7, 15, 31 s")
    assert "not every disk" not in said
    python, command, *_ = served_by()
    assert Path(python).name.startswith("python3") and Path(command).resolve() == Path("/usr/bin/fvd-lv"), (python, command)
    assert upgrade_seconds < 2 * restart_seconds + SLACK_SECONDS
    assert starts() == 3, "started, restarted and upgraded it should be"
    assert show("NRestarts") == "0" and show("ActiveState") == "active"
    say(f"the guest wrote {guest.end()} blocks, and reads them again")
    # Nobody has connected to the other one: an upgrade starts nothing.
    assert show("ActiveState", "fvd@vm2.service") == "inactive" and show("ActiveState", "fvd@vm2.socket") == "active"


def it_works_with_what_this_debian_has() -> None:
    numpy = run("python3", "-c", "import numpy; print(numpy.__version__)").strip()
    said = run("fvd-lv", "torture", "--seed", "1", "--worlds", "1", "--jobs", "1")
    say(f"numpy {numpy}: {said.splitlines()[-1]}")
    run("fvd-lv", "check", DISK)


def removed() -> None:
    # Enabled, running, one of them after its server was killed: what that had acknowledged is no business of a removal.
    os.kill(int(show("MainPID")), 9)
    until(lambda: show("NRestarts") == "1" and show("ActiveState") == "active", "it does not come back")
    run("dpkg", "--remove", "fvd")
    assert run("systemctl", "list-units", "--no-legend", "--plain", "fvd@*") == ""
    assert run("lvs", "--noheadings", "-o", "lv_attr", DISK).strip()[4] == "-", "the volume is still active"
    assert Path("/etc/fvd/vm1.conf").exists(), "a removal keeps what the administrator wrote"


def purged(before: set[str]) -> None:
    said = run("dpkg", "--purge", "fvd")
    assert "not empty" not in said and "warning" not in said, said
    assert not Path("/etc/fvd").exists() and not Path("/run/fvd").exists()
    left = files() - before - {str(DECOY)}
    assert not left, f"left by the purge: {sorted(left)}"
    assert not list(Path("/etc/systemd/system").rglob("fvd@*"))
    assert run("systemctl", "list-units", "--all", "--no-legend", "--plain", "fvd@*") == ""


def a_wheel_serves_from_a_virtual_environment(wheel: str, pip: str) -> None:
    run("dpkg", "--force-depends", "--remove", "libnbd0")
    run("python3", "-m", "venv", "--without-pip", "--system-site-packages", "/opt/fvd")
    run("env", f"PYTHONPATH={pip}", "/opt/fvd/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    run("systemctl", "link", "/opt/fvd/lib/systemd/system/fvd@.service")
    Path("/etc/fvd").mkdir()
    Path("/etc/fvd/vm1.conf").write_text(f"VOLUME={DISK}\nOPTIONS=\n")
    run("systemctl", "start", UNIT)
    assert show("StatusText") == f"serving {DISK}" and Path(served_by()[1]).resolve() == Path("/opt/fvd/bin/fvd-lv"), served_by()
    run("systemctl", "stop", UNIT)
    said = run("/opt/fvd/bin/fvd-lv", "provision", "vg0/vm3", "--size", "256M", "--base", "nbd://localhost/x", code=8)
    assert "apt install libnbd0" in said and len(said.splitlines()) == 1, said
    say(f"the wheel serves; without libnbd: {said.strip()}")


def main(older: str, newer: str, device: str, *wheel: str) -> None:
    versions = [run("dpkg-deb", "--field", package, "Version").strip().partition("~")[0] for package in (older, newer)]
    before = files()
    # Nothing of the tests' own environment: the disks are root's, served by units.
    os.environ.clear()
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", LC_ALL="C.UTF-8")
    say(f"{len(before)} files; {run('cat', '/etc/debian_version').strip()}, {run('python3', '--version').strip()}")
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    install(older)
    assert run("fvd-lv", "--version") == f"fvd-lv {versions[0]}\n"
    say(f"installed {Path(older).name}")
    for unit in ("fvd@.service", "fvd@.socket"):
        assert not run("systemctl", "list-units", "--all", "--no-legend", "--plain", "fvd@*"), "begun by itself"
        assert run("systemctl", "is-enabled", unit, code=1).strip() == "disabled"
    it_serves(device)
    say("serves a disk, and another one is waited for")
    the_upgrade_is_a_restart(newer)
    the_package_is_whole(versions[1])
    it_works_with_what_this_debian_has()
    removed()
    say("removed")
    purged(before)
    say("purged")
    if wheel:
        a_wheel_serves_from_a_virtual_environment(*wheel)
    print("All checks passed.", flush=True)


if __name__ == "__main__":
    BEGUN = time.monotonic()
    try:
        main(*sys.argv[1:])
    except BaseException:
        print(run("journalctl", "--no-pager", "--output=short-monotonic", "--lines=60"), flush=True)
        raise
