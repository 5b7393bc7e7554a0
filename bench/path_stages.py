# SPDX-License-Identifier: Apache-2.0
"""Which stage of a request a sampled call chain belongs to, and what perf saw of a process: samples by stage, system calls by name.

Only the names of functions are known here; nothing of servers, loads or tables. What a kernel worker does for a loop device is no part of
the process, and no part of this.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SAMPLES_PER_SECOND = 3999  # odd: in step with nothing
START_SECONDS = 0.3  # until perf records
CALLS = ["io_uring_enter", "recvmsg", "recvfrom", "sendmsg", "sendto", "read", "write", "readv", "writev", "preadv", "pwritev"]
CALLS += ["ppoll", "poll", "epoll_wait", "futex"]
REST = "the others"

# In the order of a request's way. What is the engine's and what is not can only be told where they are files of their own.
STAGES = (
    "receive",
    "own code: protocol and loop",
    "own code: engine",
    "own code: device queue",
    "own code: one program",
    "submit: memory pages",
    "submit: block layer and device",
    "submit: the ring",
    "complete",
    "poll",
    "reply: copy",
    "reply: wake the client",
    "reply: the rest",
    "sleep and wake",
    "interrupts",
    "enter and leave the kernel",
    "the rest of the kernel",
    "libraries and Python",
)

# The first that has a function in the chain names the stage.
KERNEL_STAGES: tuple[tuple[str, frozenset[str]], ...] = (
    (
        "interrupts",
        frozenset({"handle_softirqs", "__irq_exit_rcu", "__common_interrupt", "hrtimer_interrupt", "__flush_smp_call_function_queue"}),
    ),
    ("sleep and wake", frozenset({"schedule", "__schedule", "preempt_schedule_common", "schedule_hrtimeout_range", "futex_wake"})),
    ("sleep and wake", frozenset({"hrtimer_cancel", "hrtimer_start_range_ns", "finish_task_switch"})),
    ("reply: wake the client", frozenset({"sock_def_readable"})),
    ("reply: copy", frozenset({"skb_copy_datagram_from_iter", "tcp_sendmsg_locked"})),
    ("reply: the rest", frozenset({"__sys_sendmsg", "__sys_sendto", "sock_write_iter"})),
    ("receive", frozenset({"__sys_recvmsg", "__sys_recvfrom", "sock_read_iter"})),
    ("submit: memory pages", frozenset({"bio_iov_iter_get_pages", "iov_iter_extract_pages", "gup_fast_fallback"})),
    ("poll", frozenset({"io_poll_check_events", "io_poll_task_func", "io_poll_add", "do_sys_poll", "do_epoll_wait", "__fdget_pos"})),
    ("complete", frozenset({"__io_run_local_work", "io_run_task_work", "task_work_run", "tctx_task_work_run"})),
    ("submit: block layer and device", frozenset({"submit_bio_noacct_nocheck", "submit_bio", "blk_finish_plug", "__blk_flush_plug"})),
    ("submit: block layer and device", frozenset({"blkdev_read_iter", "blkdev_write_iter", "blkdev_fsync", "blkdev_fallocate"})),
    ("submit: block layer and device", frozenset({"do_iter_readv_writev", "vfs_iocb_iter_read", "vfs_fsync_range"})),
    ("submit: the ring", frozenset({"io_submit_sqes", "io_submit_one"})),
    ("complete", frozenset({"io_cqring_wait"})),
    ("submit: the ring", frozenset({"__do_sys_io_uring_enter", "__x64_sys_io_uring_enter", "__se_sys_io_uring_enter"})),
)
ENTRIES = re.compile(r"do_syscall_64|entry_SYSCALL|syscall_|__x64_sys_|el0_svc|invoke_syscall|exit_to_user|irqentry_")
OWN_CODE = (  # by the file that holds the function
    (re.compile(r"/_(server|nbd)\.[^/]*so$"), "own code: protocol and loop"),
    (re.compile(r"/(_engine|_engine_backend|_passthrough|_core)\.[^/]*so$"), "own code: engine"),
    (re.compile(r"/(_queue|_remote|_load)\.[^/]*so$"), "own code: device queue"),
    (re.compile(r"/(qemu-nbd|qemu-storage-daemon|nbdkit)$"), "own code: one program"),
)
KERNEL_FILES = re.compile(r"^\[(kernel|guest\.kernel)|\.ko(\.\w+)?$|^\[\w+\]$")
FRAME = re.compile(r"^\s+[0-9a-f]+ (?P<name>.*) \((?P<file>[^()]*(?:\([^()]*\))?[^()]*)\)$")


@dataclass
class Profile:
    """What perf saw of a process."""

    samples: Counter[str] = field(default_factory=Counter)  # by stage
    reason: str = ""  # why there are none

    def shares(self) -> dict[str, float]:
        """Of the samples, for every stage; they add up to 1."""
        total = sum(self.samples.values())
        return {stage: self.samples[stage] / total for stage in STAGES}


def stage_of(frames: list[tuple[str, str]]) -> str:
    """The stage of a call chain of (function, file), the innermost function first."""
    name, file = frames[0]
    if not KERNEL_FILES.search(file):
        return next((stage for pattern, stage in OWN_CODE if pattern.search(file)), "libraries and Python")
    kernel = {frame.partition(".")[0] for frame, file in frames if KERNEL_FILES.search(file)}  # a compiler adds .isra.0 and its like
    if any(frame.startswith(("asm_sysvec_", "asm_common_interrupt", "sysvec_")) for frame in kernel):
        return "interrupts"
    for stage, functions in KERNEL_STAGES:
        if kernel & functions:
            return stage
    return "enter and leave the kernel" if ENTRIES.match(name) else "the rest of the kernel"


def read_chains(lines: Iterable[str]) -> Iterator[tuple[float, list[tuple[str, str]]]]:
    """(seconds, call chain) of each sample in what `perf script -F time,ip,sym,dso` prints."""
    seconds = 0.0
    frames: list[tuple[str, str]] = []
    for line in lines:
        text = line.rstrip("\n")
        if not text.strip():
            if frames:
                yield seconds, frames
            frames = []
        elif found := FRAME.match(text):
            frames.append((found["name"], found["file"]))
        elif (head := text.strip().rstrip(":")).replace(".", "", 1).isdigit():
            seconds = float(head)
    if frames:
        yield seconds, frames


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A perf that is ended as its user would: with SIGINT, when it writes what it has."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        time.sleep(START_SECONDS)
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def refusal() -> str:
    """Why perf cannot be used; empty: it can."""
    if shutil.which("perf") is None:
        return "perf is not installed"
    with tempfile.NamedTemporaryFile(prefix="fvd-perf-") as file:
        command = ["perf", "record", "-q", "-a", "-e", "cpu-clock", "-o", file.name, "--", "true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"perf: {(done.stderr.strip().splitlines() or ['refused'])[0]}"
    symbols = Path("/proc/kallsyms")
    with symbols.open() as lines:
        if int(next(lines, "0 ").split()[0], 16) == 0:
            return "the kernel hides its symbols (kernel.kptr_restrict)"
    return ""


@contextlib.contextmanager
def profiled(pid: int, last_seconds: float | None = None) -> Iterator[Profile]:
    """Filled at the end: where a process spent its CPU time meanwhile. `last_seconds`: of it only so much, up to its last submission to the
    device: what a program does before and after its load is left out.

    The whole machine is recorded, for a recording of one process would make each of its sleeps dearer.
    """
    found = Profile()
    with tempfile.NamedTemporaryFile(prefix="fvd-perf-") as file:
        command = ["perf", "record", "-q", "-a", "-g", "-e", "cpu-clock", "-F", str(SAMPLES_PER_SECOND), "-o", file.name]
        with running(command):
            yield found
        command = ["perf", "script", "-i", file.name, "--pid", str(pid), "-F", "time,ip,sym,dso"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    samples = [(seconds, stage_of(frames)) for seconds, frames in read_chains(done.stdout.splitlines())]
    if last_seconds is not None:
        until = max((seconds for seconds, stage in samples if stage.startswith("submit")), default=0.0)
        samples = [(seconds, stage) for seconds, stage in samples if until - last_seconds <= seconds <= until]
    found.samples.update(stage for _, stage in samples)
    if not found.samples:
        found.reason = f"perf saw nothing of the process: {(done.stderr.strip().splitlines() or ['no reason given'])[0]}"


@contextlib.contextmanager
def counted_calls(pid: int) -> Iterator[dict[str, int]]:
    """Filled at the end: the system calls of a process by name, and `the others`. Stays empty where the kernel lets nobody count them."""
    found: dict[str, int] = {}
    with tempfile.NamedTemporaryFile("r", prefix="fvd-perf-") as file:
        events = ",".join(["raw_syscalls:sys_enter", *(f"syscalls:sys_enter_{name}" for name in CALLS)])
        with running(["perf", "stat", "-x", ";", "-e", events, "-p", str(pid), "-o", file.name]):
            yield found
        counts = {}
        for line in file:
            fields = line.split(";")
            if len(fields) > 2 and fields[0].isdigit():
                counts[fields[2].rpartition(":")[2].removeprefix("sys_enter_")] = int(fields[0])
    if "sys_enter" in counts:
        total = counts.pop("sys_enter")
        found.update(counts)
        found[REST] = total - sum(counts.values())
