# SPDX-License-Identifier: Apache-2.0
"""What a measurement stands on: loop devices over tmpfs, server processes, fio runs, and the facts of the machine."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


class CannotMeasure(Exception):
    """Something that this measurement needs is not on this machine."""


def need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise CannotMeasure(f"not installed: {', '.join(missing)}")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def compiled(source: str, *libraries: str) -> str:
    """A program of this folder, compiled; forgotten when this process ends."""
    need("gcc")
    folder = tempfile.TemporaryDirectory(prefix="fvd-bench-")
    atexit.register(folder.cleanup)
    program = Path(folder.name) / Path(source).stem
    command = ["gcc", "-O2", "-pthread", "-o", str(program), str(Path(__file__).with_name(source)), *(f"-l{name}" for name in libraries)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise CannotMeasure(f"gcc: {reason}" + (f"; lib{libraries[0]}-dev is needed" if libraries else ""))
    return str(program)


def facts() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")

    def version(*command: str) -> str:
        try:
            return output(*command).splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "not there"

    return {
        "kernel": platform.release(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "fio": version("fio", "--version"),
        "qemu_nbd": version("qemu-nbd", "--version"),
        "commit": version("git", "rev-parse", "--short", "HEAD"),
        "modified": bool(version("git", "status", "--porcelain", "--untracked-files=no") not in ("", "not there")),
        "load_at_start": os.getloadavg()[0],
    }


@contextlib.contextmanager
def loop_device(size_bytes: int) -> Iterator[str]:
    """A loop device with direct I/O over a fully allocated tmpfs file: software cost, no disk."""
    need("losetup")
    if os.geteuid() != 0:
        raise CannotMeasure("loop devices need root")
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="fvd-bench-") as backing:
        os.posix_fallocate(backing.fileno(), 0, size_bytes)
        try:
            device = output("losetup", "--find", "--show", "--direct-io=on", backing.name)
        except subprocess.CalledProcessError as error:
            raise CannotMeasure(f"losetup: {error.stderr.strip()}") from error
        try:
            yield device
        finally:
            subprocess.run(["losetup", "-d", device], check=False, capture_output=True)


@contextlib.contextmanager
def file_loop_device(size_bytes: int) -> Iterator[str]:
    """A loop device with direct I/O over a new, sparse file in the folder of temporary files: what it discards becomes holes there."""
    need("losetup")
    if os.geteuid() != 0:
        raise CannotMeasure("loop devices need root")
    with tempfile.NamedTemporaryFile(prefix="fvd-bench-") as backing:
        backing.truncate(size_bytes)
        try:
            device = output("losetup", "--find", "--show", "--direct-io=on", backing.name)
        except subprocess.CalledProcessError as error:
            raise CannotMeasure(f"losetup: {error.stderr.strip()}") from error
        try:
            yield device
        finally:
            subprocess.run(["losetup", "-d", device], check=False, capture_output=True)


@contextlib.contextmanager
def zeroing_device(size_bytes: int) -> Iterator[str]:
    """A loop device that writes zeros without being sent any: over a written file of ext4, which lies on a `loop_device`."""
    need("mkfs.ext4")
    with loop_device(size_bytes + size_bytes // 8 + (64 << 20)) as below, tempfile.TemporaryDirectory(prefix="fvd-bench-") as folder:
        output("mkfs.ext4", "-q", below)
        output("mount", below, folder)
        try:
            with Path(folder, "image").open("wb") as file:
                for _ in range(-(-size_bytes // (1 << 20))):
                    file.write(b"\xee" * (1 << 20))
                file.truncate(size_bytes)
            device = output("losetup", "--find", "--show", "--direct-io=on", file.name)
            try:
                yield device
            finally:
                subprocess.run(["losetup", "-d", device], check=False, capture_output=True)
        finally:
            unmount(folder)


def unmount(folder: str | Path) -> None:
    """A ring of a server that has just ended may still hold the file system for a moment."""
    for _ in range(50):
        if not subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@contextlib.contextmanager
def server(command: list[str], socket_path: Path, end: signal.Signals = signal.SIGTERM) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that is up when its socket accepts; ended with a signal."""
    import socket

    log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the server)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while True:
            probe = socket.socket(socket.AF_UNIX)
            try:
                probe.connect(str(socket_path))
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise CannotMeasure(f"{command[0]} does not serve: {log.read().decode(errors='replace').strip()}") from None
                time.sleep(0.02)
            finally:
                probe.close()
        yield process
    finally:
        process.send_signal(end)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_SECONDS


def fio(uri: str, pattern: str, *, block_bytes: int, depth: int, seconds: float, size_bytes: int) -> dict[str, float]:
    """One run of fio's nbd engine: operations a second, and how many there were."""
    printed = output(
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={pattern}",
        f"--bs={block_bytes}",
        f"--iodepth={depth}",
        f"--size={size_bytes}",
        "--time_based",
        f"--runtime={seconds}",
        "--randrepeat=0",
        "--norandommap",
        "--output-format=json",
    )
    report = json.loads(printed[printed.index("{") :])  # its engine prints a line before
    side = report["jobs"][0]["read" if "read" in pattern else "write"]
    return {
        "iops": side["iops"],
        "operations": side["total_ios"],
        "p99_us": side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000,
    }


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> str:
    """Median with the smallest and largest: ``1.93 (1.80-2.11)``."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def process_cpu_seconds(pid: int) -> float:
    """As `cpu_seconds`, to the nanosecond, threads that have ended included: the process's own CPU clock."""
    return time.clock_gettime((~pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)


def offloads_zeros(device: str) -> bool:
    """Whether a block device writes zeros without being sent any. Writes zeros to its first MiB: only a try tells, for a loop device over
    tmpfs says that it does until the first has failed."""
    import fcntl
    import struct

    BLKZEROOUT = 0x127F
    descriptor = os.open(device, os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, BLKZEROOUT, struct.pack("QQ", 0, 1 << 20))
    finally:
        os.close(descriptor)
    return int((Path("/sys/block") / Path(device).name / "queue/write_zeroes_max_bytes").read_text()) > 0
