"""NBD servers side by side: fvd, the pass-through server of the same shape, qemu-nbd with raw and with qcow2, each on its own loop device.

4 KiB random reads and writes at queue depth 32 on mapped data. Rounds are interleaved, so that drift of the machine hits all alike;
figures are ratios within a round, medians over rounds. CPU time is the server process's own, per request.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import cpu_seconds, fio, loop_device, median, need, output, server, spread

DISK_BYTES = 1 << 30
DEVICE_BYTES = (1 << 30) + (64 << 20)
PATTERNS = ("randread", "randwrite")


def uri(socket_path: Path) -> str:
    return f"nbd+unix:///?socket={socket_path}"


def fill(socket_path: Path) -> None:
    """Write every block once, so that all is mapped, and flush."""
    output(
        "fio",
        "--name=fill",
        "--ioengine=nbd",
        f"--uri={uri(socket_path)}",
        "--rw=write",
        "--bs=1M",
        "--iodepth=8",
        f"--size={DISK_BYTES}",
        "--end_fsync=1",
    )


def measure(rounds: int, seconds: float, depth: int = 32, block_bytes: int = 4096) -> dict[str, Any]:
    need("fio", "qemu-nbd", "qemu-img")
    python = sys.executable
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fvd-bench-")))
        devices = {name: stack.enter_context(loop_device(DEVICE_BYTES)) for name in ("fvd", "pass-through", "qemu raw", "qemu qcow2")}
        subprocess.run(
            [python, "-m", "fvd.cli", "provision", devices["fvd"], "--size", str(DISK_BYTES), "--force"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", devices["qemu qcow2"], str(DISK_BYTES)], check=True)
        qemu = ["qemu-nbd", "--persistent", "--cache=none", "--aio=io_uring", "--discard=unmap"]
        sockets = {name: folder / f"{number}.sock" for number, name in enumerate(devices)}
        commands = {
            "fvd": [python, "-m", "fvd.cli", "serve", devices["fvd"], "--socket", str(sockets["fvd"])],
            "pass-through": [python, "bench/passthrough.py", "serve", devices["pass-through"], "--socket", str(sockets["pass-through"])],
            "qemu raw": [*qemu, "--format=raw", f"--socket={sockets['qemu raw']}", devices["qemu raw"]],
            "qemu qcow2": [*qemu, "--format=qcow2", f"--socket={sockets['qemu qcow2']}", devices["qemu qcow2"]],
        }
        processes = {name: stack.enter_context(server(commands[name], sockets[name])) for name in commands}
        for name in commands:
            fill(sockets[name])
        samples: list[dict[str, Any]] = []
        for number in range(rounds):
            for pattern in PATTERNS:
                for name in commands if number % 2 == 0 else reversed(commands):
                    before = cpu_seconds(processes[name].pid)
                    run = fio(uri(sockets[name]), pattern, block_bytes=block_bytes, depth=depth, seconds=seconds, size_bytes=DISK_BYTES)
                    used = cpu_seconds(processes[name].pid) - before
                    cpu_us = used / run["operations"] * 1e6
                    samples.append({"round": number, "server": name, "pattern": pattern, **run, "cpu_us_per_request": cpu_us})
    return {"samples": samples, "rounds": rounds, "seconds": seconds, "depth": depth, "block_bytes": block_bytes}


def ratios(result: dict[str, Any], pattern: str, other: str, field: str) -> list[float]:
    """fvd / other, round by round."""
    value = {(s["round"], s["server"]): s[field] for s in result["samples"] if s["pattern"] == pattern}
    return [value[number, "fvd"] / value[number, other] for number in range(result["rounds"])]


GOALS = (
    # other server, field, comparison, bound
    ("qemu raw", "iops", ">=", 1.8),
    ("qemu qcow2", "iops", ">=", 1.8),
    ("pass-through", "iops", ">=", 0.9),
    ("qemu raw", "cpu_us_per_request", "<=", 0.4),
    ("qemu qcow2", "cpu_us_per_request", "<=", 0.4),
)


def report(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for the table: ratio, goal, verdict; the absolute figures stand behind."""
    rows = []
    for pattern in PATTERNS:
        for other, field, sign, bound in GOALS:
            values = ratios(result, pattern, other, field)
            reached = median(values) >= bound if sign == ">=" else median(values) <= bound
            what = "IOPS" if field == "iops" else "server CPU per request"
            rows.append(
                {
                    "what": f"4 KiB {pattern} QD32, {what}: fvd / {other}",
                    "value": spread(values),
                    "goal": f"{sign} {bound}",
                    "reached": reached,
                }
            )
    for pattern in PATTERNS:
        for name in ("fvd", "pass-through", "qemu raw", "qemu qcow2"):
            mine = [s for s in result["samples"] if s["server"] == name and s["pattern"] == pattern]
            iops = median([s["iops"] for s in mine]) / 1000
            cpu = median([s["cpu_us_per_request"] for s in mine])
            rows.append(
                {"what": f"4 KiB {pattern} QD32, {name}", "value": f"{iops:.1f} kIOPS, {cpu:.1f} us CPU", "goal": "", "reached": None}
            )
    return rows
