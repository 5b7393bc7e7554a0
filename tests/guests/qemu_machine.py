# SPDX-License-Identifier: Apache-2.0
"""A virtual machine for the tests: QEMU without KVM, Debian's kernel, an initrd with busybox and mke2fs, and a shell at a serial port.

Its memory is a memfd, as a server of vhost-user needs it. It has no disk until it is given one. Nothing in it is a measurement of speed.
Knows no server.
"""

from __future__ import annotations

import contextlib
import functools
import lzma
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from qemu_running import Qmp, running

ROOT = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
SECONDS_MAX = 120  # of a boot, and of a command unless it says otherwise
MARK = "-- ended with"
THREADS, BLOCKS = 4, 1000  # of the load
# In this order: each needs those before it.
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
PROGRAMS = ("mke2fs", "e2fsck")
SHELL_PORT = "/dev/ttyS1"
INIT = rf"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir /tmp /mnt
for module in {" ".join(MODULES)}; do insmod /modules/$module.ko; done
exec 3<>{SHELL_PORT}
stty raw -echo <&3
echo "{MARK} 0" >&3
while IFS= read -r line <&3; do
    eval "$line" </dev/null >&3 2>&1
    echo "{MARK} $?" >&3
done
"""


def kernel_folder() -> Path:
    """Where the kernel, its modules and busybox have been unpacked."""
    done = subprocess.run([ROOT / "scripts" / "guest-kernel"], capture_output=True, text=True, check=False)
    if done.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(done.stderr)
    return Path(done.stdout.splitlines()[-1])


@functools.cache
def libraries(program: str) -> tuple[Path, ...]:
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return tuple(Path(path) for path in re.findall(r"(/\S+) \(0x", told))


def make_initrd(folder: Path, kernel: Path) -> Path:
    """The whole file system of the machine; `steady_io` is in it."""
    if shutil.which("gcc") is None or shutil.which("ldd") is None:
        pytest.skip("gcc or ldd is not installed")
    root = folder / "initrd"
    for name in ("bin", "dev", "etc", "modules", "proc", "sys"):
        (root / name).mkdir(parents=True)
    source = Path(__file__).parent / "steady_io.c"
    subprocess.run(["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", root / "bin/steady_io", source], check=True)
    [busybox] = kernel.glob("root/**/bin/busybox")
    shutil.copy(busybox, root / "bin/busybox")
    for name in PROGRAMS:
        program = shutil.which(name, path="/usr/sbin:/sbin")
        assert program is not None
        for path in (Path(program), *libraries(program)):
            place = root / "e2fs" / path.name if str(path) == program else root / str(path).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.resolve(), place)
    shutil.copy("/etc/mke2fs.conf", root / "etc/mke2fs.conf")
    for module in MODULES:
        [path] = kernel.glob(f"root/**/{module}.ko*")
        data = path.read_bytes()
        (root / f"modules/{module}.ko").write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    packed = folder / "initrd.cpio"
    with packed.open("wb") as file:
        find = subprocess.Popen(["find", "."], cwd=root, stdout=subprocess.PIPE)
        subprocess.run(
            [busybox, "cpio", "-o", "-H", "newc"], cwd=root, stdin=find.stdout, stdout=file, stderr=subprocess.DEVNULL, check=True
        )
        assert find.wait() == 0
    shutil.rmtree(root)
    return packed


class Machine:
    """A machine that runs, and its shell. `qmp`: QEMU's own language."""

    def __init__(self, qmp: Qmp, shell: Path, console: Path) -> None:
        self.qmp = qmp
        self._console = console
        self._shell = socket.socket(socket.AF_UNIX)
        self._shell.connect(str(shell))
        self._said = ""

    def _until_mark(self, seconds: float) -> tuple[str, int]:
        end = time.monotonic() + seconds
        while (found := re.search(rf"(.*?)^{MARK} (\d+)\n", self._said, re.MULTILINE | re.DOTALL)) is None:
            self._shell.settimeout(max(end - time.monotonic(), 0.01))
            try:
                more = self._shell.recv(1 << 16)
            except TimeoutError:
                more = b""
            if not more:
                pytest.fail(f"the machine says no more; {self._said!r}\n{self.console[-2000:]}")
            self._said += more.decode(errors="replace").replace("\r", "")
        self._said = self._said[found.end() :]
        return found[1], int(found[2])

    def wait_for_shell(self) -> None:
        """Back when it has booted, for the first time or again."""
        self.end()

    def begin(self, command: str) -> None:
        """Begins a command and does not wait for its end."""
        self._shell.sendall(" ; ".join(command.strip().splitlines()).replace("& ;", "&").encode() + b"\n")

    def end(self, seconds: float = SECONDS_MAX) -> str:
        """What the command that was begun has said, when it has ended well."""
        said, code = self._until_mark(seconds)
        assert code == 0, f"{said}\n{self.console[-2000:]}"
        return said

    def run(self, command: str, seconds: float = SECONDS_MAX) -> str:
        """The lines of a shell script; returns what it said."""
        self.begin(command)
        return self.end(seconds)

    @property
    def console(self) -> str:
        """What the kernel has said."""
        return self._console.read_text(errors="replace")

    def close(self) -> None:
        self._shell.close()


class Maker:
    """Makes machines in a folder, all with the same kernel and initrd."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        kernel = kernel_folder()
        [self._kernel] = kernel.glob("root/boot/vmlinuz-*")
        self._initrd = make_initrd(folder, kernel)

    @contextlib.contextmanager
    def machine(self, name: str, *words: str, processors: int = 1, memory: str = "192M", more_memory: str = "") -> Iterator[Machine]:
        """One that is being started. `words`: for QEMU, beside what every machine has. `more_memory`: of `-m`."""
        shell, console, qmp_path = (self._folder / f"{name}.{end}" for end in ("shell", "console", "qmp"))
        command = [
            *(QEMU, "-nodefaults", "-display", "none", "-no-user-config", "-cpu", "max"),
            *("-machine", "q35,accel=tcg,memory-backend=memory", "-smp", str(processors), "-m", memory + more_memory),
            *("-object", f"memory-backend-memfd,id=memory,size={memory},share=on"),
            *("-kernel", str(self._kernel), "-initrd", str(self._initrd)),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on"),
            *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=shell,path={shell},server=on,wait=off", "-serial", "chardev:shell"),
            *("-qmp", f"unix:{qmp_path},server=on,wait=off"),
        ]
        with running([*command, *words], qmp_path) as qmp:
            machine = Machine(qmp, shell, console)
            try:
                yield machine
            finally:
                machine.close()


def disk(path: Path, *, queues: int = 1, name: str = "disk", more: str = "") -> Sequence[str]:
    """A disk that is served there by vhost-user; the machine waits for its server, and connects again each second."""
    return (
        *("-chardev", f"socket,id={name}-server,path={path},reconnect=1"),
        *("-device", f"vhost-user-blk-pci,id={name},chardev={name}-server,num-queues={queues}{more}"),
    )


def load_steadily(machine: Machine, place: str = "/dev/vda") -> None:
    """Begins steady_io there: on the whole disk, or in a file."""
    size = f"dd if=/dev/zero of={place} bs=4k count={THREADS * BLOCKS}\n" if place != "/dev/vda" else ""
    machine.run(f"{size}rm -f /tmp/stop\nsteady_io {place} {THREADS} {BLOCKS} 7 /tmp/stop >/tmp/load 2>&1 &")


def load_ends_well(machine: Machine) -> float:
    """Ends it. Nothing failed, and everything that it wrote was there; returns the seconds of its longest operation."""
    said = machine.run("touch /tmp/stop\nwait\ncat /tmp/load")
    figures = re.fullmatch(r"(\d+) operations, (\d+) errors, (\d+) bad, longest (\d+) ms\n", said)
    assert figures is not None, said
    operations, errors, bad, longest_ms = map(int, figures.groups())
    assert (errors, bad) == (0, 0) and operations > THREADS * BLOCKS, said
    return longest_ms / 1000
