# SPDX-License-Identifier: Apache-2.0
"""Large disks and many disks: what opening them costs, what they hold in memory, and whether a request costs the same as on a small one.

Large disks lie in sparse files in memory (large_disks.py): their maps are whole, their data are holes. Full ones map every chunk, with
slots in no order, and are read at places all over them, so no part of their maps stays in the processor's cache: the worst case.
Many disks are served by one process, in one thread; all of them together are under as many requests as one disk alone is.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from large_disks import MEMORY, loop_over, make_disk, need_memory
from load import Pattern, fio_command, resident_bytes, under_load
from loads import many_command
from machine import CannotMeasure, need, output, server
from suite import Plan, Plot, Row, Series, missing, ratio, row

TITLE = "1, 10 and 100 TiB: opening, memory, cost of a request; 1, 8 and 64 disks in one process"
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
SIZES = {"1 GiB": GIB, "1 TiB": TIB, "10 TiB": 10 * TIB, "100 TiB": 100 * TIB}
LARGE = ("1 TiB", "10 TiB", "100 TiB")
BETTER: dict[str, Literal["more", "less"]] = {"iops": "more", "cpu_us_per_request": "less"}
OPEN_GOAL_MS = 50
LONG_OPEN_BYTES = 10 * TIB
REQUESTS_DEPTH = 32
TOTAL_DEPTH = 64  # of all disks together
DISK_METADATA_BYTES = 32 * MIB  # of one of many disks
QCOW2_BYTES = TIB
MEMORY_PER_TIB_BYTES = 7 * MIB  # of maps: in a file, and as much again in the process that has the disk open


def measure(plan: Plan) -> dict[str, Any]:
    result: dict[str, Any] = {"mode": plan.mode, "depth": REQUESTS_DEPTH, "total_depth": TOTAL_DEPTH, "not_measured": {}}
    sizes = plan.of(("1 TiB", "100 TiB"), ("1 TiB", "100 TiB"), LARGE)
    fills = plan.of((False,), (False, True), (False, True))
    need_memory(GIB + 3 * SIZES[sizes[-1]] // TIB * MEMORY_PER_TIB_BYTES)
    with tempfile.TemporaryDirectory(prefix="fvd-bench-", dir=MEMORY) as name:
        files = LargeFiles(Path(name))
        result["openings"] = measure_openings(files, sizes, fills, plan.rounds, plan.of(1, 1, 5))
        files.forget(full=False)
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "requests": lambda: measure_requests(files, plan),
            "disks": lambda: measure_disks(plan),
        }
        for part, measured in parts.items():
            try:
                result[part] = measured()
            except CannotMeasure as reason:
                result[part] = []
                result["not_measured"][part] = str(reason)
            files.forget(full=True)
    return result


class LargeFiles:
    """Each large disk is made when it is asked for the first time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, size: str, *, full: bool) -> Path:
        path = self._path(size, full)
        if not path.exists():
            make_disk(path, SIZES[size], full=full)
        return path

    def forget(self, *, full: bool) -> None:
        """Gives the memory of all full ones, or all empty ones, back."""
        for size in SIZES:
            self._path(size, full).unlink(missing_ok=True)

    def _path(self, size: str, full: bool) -> Path:
        return self._folder / f"{size.replace(' ', '')}-{'full' if full else 'empty'}"


# --- Opening -----------------------------------------------------------------------------------------------------------------------


def measure_openings(
    files: LargeFiles, sizes: tuple[str, ...], fills: tuple[bool, ...], rounds: int, most_long: int
) -> list[dict[str, Any]]:
    """Each open in a process of its own. `most_long`: how many opens there may be of a disk that takes seconds."""
    samples = []
    kinds = [(size, full) for full in fills for size in sizes]
    for number in range(rounds):
        for size, full in kinds if number % 2 == 0 else reversed(kinds):
            if SIZES[size] > LONG_OPEN_BYTES and number >= most_long:
                continue
            volume = f"file:{files.get(size, full=full)}"
            found = json.loads(output(sys.executable, str(Path(__file__).with_name("open_disk.py")), volume))
            samples.append({"round": number, "size": size, "full": full, **found})
    return samples


# --- Requests ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(devices: list[str], socket_path: Path) -> Iterator[int]:
    """One process that serves the disks, by the names of their devices: its number."""
    command = [sys.executable, "-m", "fvd.cli", "serve", *devices, "--socket", str(socket_path)]
    with server(command, socket_path) as process:
        yield process.pid


@contextlib.contextmanager
def served_qcow2(folder: Path) -> Iterator[tuple[int, str, str]]:
    """A qcow2 of 1 TiB with every cluster mapped, by qemu-nbd: its number, its URI, its device."""
    need("qemu-nbd", "qemu-img")
    path, socket_path = folder / "qcow2", folder / "qcow2.sock"
    try:
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(path), str(QCOW2_BYTES)]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // MIB * MIB + MIB)  # a loop device has whole sectors
        with loop_over(path) as device:
            command = ["qemu-nbd", "--persistent", "--cache=none", "--aio=io_uring", "--format=qcow2", f"--socket={socket_path}", device]
            with server(command, socket_path) as process:
                yield process.pid, f"nbd+unix:///?socket={socket_path}", device
    finally:
        path.unlink(missing_ok=True)


def measure_requests(files: LargeFiles, plan: Plan) -> list[dict[str, Any]]:
    """4 KiB random reads all over full disks, each served by a process of its own."""
    if plan.mode == "quick":
        raise CannotMeasure("takes longer than the quick mode has")
    samples: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fvd-bench-", dir=MEMORY)))
        targets: list[tuple[dict[str, Any], int, str, str, int]] = []
        for size in plan.of((), ("1 GiB", "1 TiB", "100 TiB"), tuple(SIZES)):
            size_bytes = SIZES[size]
            device = stack.enter_context(loop_over(files.get(size, full=True)))
            socket_path = folder / f"{size_bytes}.sock"
            pid = stack.enter_context(served([device], socket_path))
            targets.append(({"server": "fvd", "size": size}, pid, f"nbd+unix:///?socket={socket_path}", device, size_bytes))
        with contextlib.suppress(CannotMeasure):
            pid, uri, device = stack.enter_context(served_qcow2(folder))
            targets.append(({"server": "qemu qcow2", "size": "1 TiB"}, pid, uri, device, QCOW2_BYTES))
        memory = {pid: resident_bytes(pid) for _, pid, _, _, _ in targets}
        for number in range(plan.rounds):
            for what, pid, uri, device, size_bytes in targets if number % 2 == 0 else reversed(targets):
                seconds = plan.of(0.5, 0.8, plan.seconds)
                client = fio_command(uri, "randread", depth=REQUESTS_DEPTH, size_bytes=size_bytes)
                seen = under_load(client, [device], pid, "randread", seconds)
                after = {"memory_bytes": memory[pid], "loaded_memory_bytes": resident_bytes(pid)}
                samples.append({"round": number, **what, **seen, **after})
    return samples


# --- Many disks --------------------------------------------------------------------------------------------------------------------


def measure_disks(plan: Plan) -> list[dict[str, Any]]:
    """1, 8 and 64 disks that hold as much together, each group served by one process. One disk is also asked over 64 connections: that
    is what the connections cost by themselves."""
    numbers = plan.of((1, 8), (1, 8, 64), (1, 8, 64))
    total_bytes = plan.of(256 * MIB, GIB, 4 * GIB)
    patterns: tuple[Pattern, ...] = plan.of(("randread",), ("randread", "randwrite"), ("randread", "randwrite"))
    seconds = plan.of(0.5, 0.8, plan.seconds)
    need_memory(len(numbers) * total_bytes + sum(numbers) * DISK_METADATA_BYTES)
    return many_disks(numbers, total_bytes, patterns, plan.rounds, seconds, plan.of((), ("randwrite",), ()))


def many_disks(
    numbers: tuple[int, ...],
    total_bytes: int,
    patterns: tuple[Pattern, ...],
    rounds: int,
    seconds: float,
    ends_only: tuple[Pattern, ...] = (),
) -> list[dict[str, Any]]:
    """`ends_only`: patterns that only the smallest and the largest number of disks are asked for."""
    samples: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fvd-bench-", dir=MEMORY)))
        groups = []
        for count in numbers:
            devices = [stack.enter_context(full_disk(folder / f"{count}-{at}", total_bytes // count)) for at in range(count)]
            socket_path = folder / f"{count}.sock"
            pid = stack.enter_context(served(devices, socket_path))
            names = [Path(device).name for device in devices]
            groups.append((count, devices, pid, socket_path, names))
            if count == 1 and numbers[-1] > 8:  # in a minute more than fits a quick look
                groups.append((1, devices, pid, socket_path, names * numbers[-1]))
        for number in range(rounds):
            for pattern in patterns:
                for count, devices, pid, socket_path, names in groups if number % 2 == 0 else reversed(groups):
                    if pattern in ends_only and (count, len(names)) not in ((1, 1), (numbers[-1], numbers[-1])):
                        continue
                    client = many_command(
                        socket_path, pattern, depth=TOTAL_DEPTH // len(names), size_bytes=total_bytes // count, exports=names
                    )
                    seen = under_load(client, devices, pid, pattern, seconds)
                    what = {"round": number, "disks": count, "connections": len(names), "pattern": pattern}
                    samples.append({**what, **seen, "memory_bytes": resident_bytes(pid)})
    return samples


@contextlib.contextmanager
def full_disk(path: Path, size_bytes: int) -> Iterator[str]:
    """A loop device with a disk on it that maps everything, over a new file that holds all it may need."""
    make_disk(path, size_bytes, full=True)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    with loop_over(path) as device:
        yield device


# --- What a reader wants to know ---------------------------------------------------------------------------------------------------


def rows(result: dict[str, Any]) -> list[Row]:
    return opening_rows(result) + memory_rows(result) + request_rows(result) + disk_rows(result) + memory_of_disks(result)


def opening_rows(result: dict[str, Any]) -> list[Row]:
    made = []
    for full in (False, True):
        for size in LARGE:
            mine = [s for s in result["openings"] if (s["size"], s["full"]) == (size, full)]
            what = f"open() of {size}, {'every chunk mapped' if full else 'empty'}"
            if not mine:
                made.append(missing(what, f"not in the {result['mode']} mode"))
                continue
            goal = f"<= {OPEN_GOAL_MS}" if size == "1 TiB" else ""
            note = f"{statistics.median(s['cpu_ms'] for s in mine):.0f} ms of CPU"
            made.append(row(what, [s["milliseconds"] for s in mine], unit="ms", goal=goal, note=note, digits=1))
    return made


def memory_rows(result: dict[str, Any]) -> list[Row]:
    made = []
    for size in LARGE:
        opened = [s for s in result["openings"] if s["size"] == size]
        tebibytes = SIZES[size] / TIB
        if opened:
            for full in sorted({s["full"] for s in opened}):
                values = [s["memory_bytes"] / MIB / tebibytes for s in opened if s["full"] == full]
                made.append(row(f"memory of an open disk of {size}, {'full' if full else 'empty'}", values, unit="MiB per TiB"))
        small, large = (
            {s["round"]: s["loaded_memory_bytes"] for s in result["requests"] if (s["server"], s["size"]) == ("fvd", name)}
            for name in ("1 GiB", size)
        )
        grown = [(large[number] - small[number]) / MIB / tebibytes for number in large if number in small]
        what = f"server's memory for a full disk of {size}, beyond that for 1 GiB"
        made.append(row(what, grown, unit="MiB per TiB") if grown else missing(what, why(result, "requests")))
    return made


def why(result: dict[str, Any], part: str) -> str:
    return str(result["not_measured"].get(part, f"not in the {result['mode']} mode"))


def figures(samples: list[dict[str, Any]], **wanted: Any) -> str:
    """The absolute figures of matching samples."""
    mine = [s for s in samples if all(s[key] == value for key, value in wanted.items())]
    if not mine:
        return ""
    middle = {field: statistics.median(s[field] for s in mine) for field in ("iops", "cpu_us_per_request", "client_cpu_us_per_request")}
    client = f"client {middle['client_cpu_us_per_request']:.1f}"
    return f"{middle['iops'] / 1000:.1f} kIOPS, {middle['cpu_us_per_request']:.1f} us CPU ({client})"


def request_rows(result: dict[str, Any]) -> list[Row]:
    samples, made = result["requests"], []
    reading = f"4 KiB random reads QD{result['depth']}"
    for field, name, goal in (("cpu_us_per_request", "server CPU per request", "<= 1.10"), ("iops", "IOPS", "")):
        for one, other in (("100 TiB", "1 TiB"), ("10 TiB", "1 TiB"), ("1 TiB", "1 GiB")):
            what = f"{reading}, {name}: {one} / {other}"
            mine = goal if one == "100 TiB" else ""
            values = ratio(samples, field, {"server": "fvd", "size": one}, {"server": "fvd", "size": other})
            note = " / ".join(figures(samples, server="fvd", size=size) for size in (one, other))
            made.append(row(what, values, goal=mine, note=note) if values else missing(what, why(result, "requests"), mine))
        values = ratio(samples, field, {"server": "fvd", "size": "1 TiB"}, {"server": "qemu qcow2", "size": "1 TiB"})
        what = f"{reading} of a full disk of 1 TiB, {name}: fvd / qemu qcow2"
        if values:
            note = " / ".join(figures(samples, server=name, size="1 TiB") for name in ("fvd", "qemu qcow2"))
            made.append(row(what, values, against="qemu qcow2", better=BETTER[field], note=note))
        else:
            reason = why(result, "requests") if not samples else "qemu-nbd did not serve a qcow2 of 1 TiB here"
            made.append(missing(what, reason))
    reason = "its tables of a full disk of 100 TiB take 12.5 GiB, more than is put in memory here"
    made.append(missing("the same of a qcow2 of 100 TiB", reason))
    return made


def disk_rows(result: dict[str, Any]) -> list[Row]:
    """Pairs without a goal that were not measured are told in one line."""
    samples, left_out = result["disks"], False
    made: list[Row] = []
    for pattern in ("randread", "randwrite"):
        for field, name, goal in (("cpu_us_per_request", "server CPU per request", "<= 1.25"), ("iops", "IOPS", ">= 0.75")):
            pairs = [(64, 64, 1, 1, goal), (8, 8, 1, 1, ""), (64, 64, 1, 64, "")]
            if pattern == "randread":
                pairs.append((1, 64, 1, 1, ""))
            for disks, connections, other_disks, other_connections, bound in pairs:
                one = {"disks": disks, "connections": connections, "pattern": pattern}
                other = {"disks": other_disks, "connections": other_connections, "pattern": pattern}
                what = f"4 KiB {pattern}, {result['total_depth']} in flight, {name}: {called(one)} / {called(other)}"
                values = ratio(samples, field, one, other)
                note = " / ".join(figures(samples, **side) for side in (one, other))
                if values:
                    made.append(row(what, values, goal=bound, note=note))
                elif bound:
                    made.append(missing(what, why(result, "disks"), bound))
                else:
                    left_out = True
    if left_out:
        made.append(missing("further pairs of disks and connections", why(result, "disks")))
    return made


def memory_of_disks(result: dict[str, Any]) -> list[Row]:
    alone = {s["round"]: s["memory_bytes"] for s in result["disks"] if s["disks"] == 1}
    made = []
    for count in (8, 64):
        what = f"server's memory for each further disk, {count} disks"
        together = {s["round"]: s["memory_bytes"] for s in result["disks"] if s["disks"] == count}
        values = [(together[number] - alone[number]) / (count - 1) / MIB for number in together if number in alone]
        made.append(row(what, values, unit="MiB") if values else missing(what, why(result, "disks")))
    return made


def called(group: dict[str, Any]) -> str:
    if group["disks"] == group["connections"]:
        return f"{group['disks']} disk{'s' if group['disks'] > 1 else ''}"
    return f"{group['disks']} disk over {group['connections']} connections"


def plots(result: dict[str, Any]) -> list[Plot]:
    made: list[Plot] = []
    x = [SIZES[size] / TIB for size in LARGE if any(s["size"] == size for s in result["openings"])]
    opened: list[Series] = []
    for full in sorted({s["full"] for s in result["openings"]}):
        points = [[s["milliseconds"] for s in result["openings"] if (s["full"], SIZES[s["size"]] / TIB) == (full, at)] for at in x]
        opened.append({"name": "every chunk mapped" if full else "empty", "points": points})
    made.append(
        {
            "name": "opening",
            "title": "Opening a disk",
            "kind": "lines",
            "unit": "ms",
            "x": x,
            "x_unit": "TiB",
            "series": opened,
            "logarithmic": True,
            "better": "less",
        }
    )
    if result["requests"]:
        series: list[Series] = []
        for name in ("fvd", "qemu qcow2"):
            points = [[s["cpu_us_per_request"] for s in result["requests"] if (s["server"], s["size"]) == (name, size)] for size in SIZES]
            if any(points):
                series.append({"name": name, "points": points})
        made.append(
            {
                "name": "request-by-size",
                "title": "4 KiB random reads all over a full disk",
                "kind": "bars",
                "unit": "us of server CPU per request",
                "x": list(SIZES),
                "series": series,
                "better": "less",
            }
        )
    groups = sorted({(s["disks"], s["connections"]) for s in result["disks"]})
    if groups:
        names = [called({"disks": disks, "connections": connections}) for disks, connections in groups]
        for field, name, unit in (
            ("cpu_us_per_request", "many-disks-cpu", "us of server CPU per request"),
            ("iops", "many-disks-iops", "IOPS"),
        ):
            series = [
                {
                    "name": pattern,
                    "points": [
                        [s[field] for s in result["disks"] if (s["pattern"], s["disks"], s["connections"]) == (pattern, *group)]
                        for group in groups
                    ],
                }
                for pattern in sorted({s["pattern"] for s in result["disks"]})
            ]
            made.append(
                {
                    "name": name,
                    "title": f"Disks served by one process, {result['total_depth']} requests of 4 KiB in flight in all",
                    "kind": "bars",
                    "unit": unit,
                    "x": names,
                    "series": series,
                    "better": BETTER[field],
                    "caption": "The client is one thread, whatever the number of connections.",
                }
            )
    return made
