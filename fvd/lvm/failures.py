# SPDX-License-Identifier: Apache-2.0
"""What a command of lvm2 or dmsetup says when it fails: the line that tells why, and the typed error for it. Pure: runs nothing.

Words are believed only where no field of a report tells the same (`commands.py` asks for those first): they differ between versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from fvd.errors import Conflict, DeviceError, FvdError, InUse, NoSpace, NotFound, PermissionDenied, Unsupported
from fvd.lvm.runner import Finished

# What lvm says when there is no more space, in the versions from 2.02 to 2.03.
_NO_SPACE = re.compile(r"insufficient (free space|suitable|allocatable)|free extents|not enough free|no free extents", re.IGNORECASE)
_NOT_FOUND = re.compile(
    r"failed to find logical volume|volume group \"?\S*\"? not found|not found in volume group|one or more specified logical", re.IGNORECASE
)
_IN_USE = re.compile(
    r"\bin use\b|is used by another device|contains a filesystem in use|can't open|held open|device or resource busy", re.IGNORECASE
)
_ELSEWHERE = re.compile(r"cannot access VG \S+ with system ID|locked by another host|LV locked by other host", re.IGNORECASE)
_SHARED = re.compile(r"lock manager|lvmlockd|clustered volume group|skipping clustered", re.IGNORECASE)
_NO_DM = re.compile(
    r"device-mapper driver missing|failure to communicate with kernel device-mapper|/dev/mapper/control: open failed", re.IGNORECASE
)
_NO_RIGHTS = re.compile(r"permission denied|operation not permitted|must be root|requires root", re.IGNORECASE)
_EXISTS = re.compile(r"already exists in volume group", re.IGNORECASE)
# They pass by themselves: somebody scans the device, or has the lock file in hand.
_PASSES = re.compile(
    r"resource temporarily unavailable|can't get lock|failed to lock|read locks? failed|device or resource busy", re.IGNORECASE
)

Meaning = tuple[type[FvdError], str]
NO_DM: Meaning = (Unsupported, "; this kernel has no device-mapper, so no logical volume can be used here (modprobe dm-mod)")
ELSEWHERE: Meaning = (InUse, "; the group belongs to another host")
SHARED: Meaning = (Unsupported, "; shared and clustered groups are not supported yet")
NO_SPACE: Meaning = (NoSpace, "; add a physical volume to the group (vgextend)")
EXISTS: Meaning = (Conflict, "")
NOT_FOUND: Meaning = (NotFound, "")
NO_RIGHTS: Meaning = (PermissionDenied, "; logical volumes need root")
IN_USE: Meaning = (InUse, "")
_WORDS: tuple[tuple[re.Pattern[str], Meaning], ...] = (
    (_NO_DM, NO_DM),
    (_ELSEWHERE, ELSEWHERE),
    (_SHARED, SHARED),
    (_NO_SPACE, NO_SPACE),
    (_EXISTS, EXISTS),
    (_NOT_FOUND, NOT_FOUND),
    (_NO_RIGHTS, NO_RIGHTS),
    (_IN_USE, IN_USE),
)


def passes(done: Finished) -> bool:
    """Whether it failed for what is over soon."""
    return done.exit_code != 0 and (done.crashed or any(_PASSES.search(line) for line in (done.stderr, *_logged(done.stdout))))


def failure(done: Finished, meaning: Meaning | None = None) -> FvdError:
    """The typed error of a command that failed. `meaning`: what is known of it; None: its words tell."""
    program = done.words[0]
    if done.killed:
        return DeviceError(f"{program} was killed by signal {-done.exit_code}")
    lines = list(_lines(done))
    for pattern, its in _WORDS:
        if meaning is None or meaning == its:
            for line in lines:
                if pattern.search(line):
                    kind, advice = its
                    return kind(f"{program}: {line}{advice}")
    kind, advice = meaning or (DeviceError, "")
    return kind(f"{program} failed: {next(iter(lines), f'exit status {done.exit_code}')}{advice}")


def _lines(done: Finished) -> Iterator[str]:
    """What it complains of, the cause first: lvm tells first what went wrong, and then what it does not do because of that.

    Indented lines are told on the way (`log/indent` is ours); a warning is true, perhaps, and not why the command failed.
    """
    said = [line for line in done.stderr.splitlines() if line.strip()]
    for some in ([line for line in said if not line.startswith(" ")], [line for line in said if line.startswith(" ")]):
        yield from (line.strip() for line in some if not line.lstrip().startswith("WARNING:"))
    yield from _logged(done.stdout)


def _logged(answer: str) -> Iterator[str]:
    """The errors of a report's own log: where lvm puts them into it all the same. Then its last line, if it is no report."""
    try:
        for entry in json.loads(answer).get("log", []):
            if entry["log_type"] == "error":
                yield str(entry["log_message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        yield from [line.strip() for line in answer.splitlines() if line.strip()][-1:]
