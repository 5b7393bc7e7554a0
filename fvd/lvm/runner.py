# SPDX-License-Identifier: Apache-2.0
"""Runs one command of lvm2 or dmsetup to its end: fixed environment, a time limit, a kill that is waited for. Knows no command's meaning.

`run_command` is the only place from which a command leaves this process; the tests put a simulated machine there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from fvd._lifetime import checkpoint, times_asked
from fvd.errors import DeviceError, PermissionDenied, Timeout, Unsupported

# /usr/sbin is not in an ordinary user's PATH on Debian.
PROGRAM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
# lvm blocks signals while it holds a group's lock: it is asked to end, and given time to put things in order, before it is killed.
TERM_SECONDS = 5.0
LOOK_SECONDS = 0.1  # so often work that waits for a command looks whether it has been asked twice to stop
# os-brick's experience: lvm2 crashes now and then (128 + SIGSEGV as a shell tells it; subprocess says -11), and the next run works.
CRASHED = (139, -signal.SIGSEGV)
OUTPUT_BYTES_MAX = 64 << 20  # a report of some hundred thousand volumes
KEPT_VARIABLES = ("LVM_SYSTEM_DIR", "DM_DEV_DIR")


@dataclass(frozen=True)
class Finished:
    """What a command left."""

    words: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def crashed(self) -> bool:
        return self.exit_code in CRASHED

    @property
    def killed(self) -> bool:
        """By somebody's signal, ours excepted: that is a Timeout."""
        return self.exit_code < 0 and not self.crashed


class Unfinished(Timeout):
    """The command was ended by us because it took too long: what it was doing may be half done."""


def run_command(words: Sequence[str], timeout_seconds: float) -> Finished:
    """Runs the command to its end, whatever its exit code.

    Raises Unfinished (it is dead when this is raised, however long that takes), Unsupported (no such program here).
    """
    program = shutil.which(words[0], path=PROGRAM_PATH)
    if program is None:
        raise Unsupported(f"{words[0]} is needed for logical volumes and is not here; install lvm2")
    begun = time.monotonic()
    environment = {"PATH": PROGRAM_PATH, "LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
    environment |= {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    # Files, not pipes: a daemon that a command starts (lvmpolld, dmeventd) would hold a pipe open long after the command has ended.
    # In memory: a full /tmp must not be what keeps a volume from growing.
    with _memory("out") as out, _memory("err") as err:
        try:
            child = subprocess.Popen(
                [program, *words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                # Ctrl-C at a terminal goes to the whole foreground group; an lvextend must not be interrupted by it.
                start_new_session=True,
            )
        except PermissionError as error:
            raise PermissionDenied(f"{program} may not be run by you; logical volumes need root") from error
        except OSError as error:
            raise DeviceError(
                f"{program} cannot be started ({error.strerror}); the limits of processes, files or memory are reached"
            ) from error
        ended = _wait(child, timeout_seconds)
        stdout, stderr = _text(out), _text(err)
    if not ended:
        quoted = f"; it said: {last_line(stderr)}" if stderr.strip() else ""
        raise Unfinished(f"{words[0]} did not end within {timeout_seconds:g} s and was killed{quoted}")
    return Finished(tuple(words), child.returncode, stdout, stderr, time.monotonic() - begun)


def _wait(child: subprocess.Popen[bytes], timeout_seconds: float) -> bool:
    """Until the child has ended; False: it had to be killed. Waits as long as the kernel keeps it: while it lives, a second command would
    believe in a state that is not so. An interruption (Ctrl-C, or whoever asks this thread's work to stop) lets it end by itself, a second
    one ends it, and is passed on then."""
    interruption: BaseException | None = None
    asked_before = times_asked()
    ended = True
    for number, seconds in ((None, timeout_seconds), (signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, None)):
        if number is not None:
            ended = False
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
        deadline = None if seconds is None else time.monotonic() + seconds
        while child.returncode is None:
            try:
                child.wait(LOOK_SECONDS if deadline is None else max(0.0, min(LOOK_SECONDS, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                if (deadline is not None and time.monotonic() >= deadline) or (number is None and times_asked() > asked_before + 1):
                    break
            except BaseException as error:
                again, interruption = interruption is not None, error
                if again and number is None:
                    break
        if child.returncode is not None:
            break
    if interruption is not None:
        raise interruption
    checkpoint()
    return ended


def _memory(name: str) -> IO[bytes]:
    try:
        return os.fdopen(os.memfd_create(f"fvd-{name}", os.MFD_CLOEXEC), "w+b")
    except OSError as error:
        raise DeviceError(f"no memory or descriptor for the output of a command ({error.strerror}); raise the limits") from error


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(OUTPUT_BYTES_MAX).decode(errors="replace")


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
