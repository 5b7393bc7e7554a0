# SPDX-License-Identifier: Apache-2.0
"""What else lives on a device: file systems, partition tables, RAID members, as libblkid (util-linux) sees them.

Asks the `wipefs` program with explicit options and a timeout, for it lists everything that probing finds, at every offset. Reads and wipes;
decides nothing. Knows nothing of the disk format.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass

from fvd.device.node import Node
from fvd.errors import DeviceError, Timeout, Unsupported, quoted

TIMEOUT_SECONDS = 30.0
# /usr/sbin is not in an ordinary user's PATH on Debian.
_PROGRAM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Signature:
    """A known mark of a file system, partition table or volume manager."""

    type: str
    offset_bytes: int
    label: str | None = None
    uuid: str | None = None

    def __str__(self) -> str:
        return f"{self.type}{f' {quoted(self.label)}' if self.label else ''} (at byte {self.offset_bytes})"


def find_signatures(target: Node | str | os.PathLike[str], *, timeout_seconds: float = TIMEOUT_SECONDS) -> list[Signature]:
    """Every foreign signature on `target`, in the order of their offsets. Reads only.

    Raises Unsupported (no wipefs here), Timeout, DeviceError.
    """
    answer = _wipefs(target, ["--no-act", "--json", "--output", "OFFSET,TYPE,LABEL,UUID"], timeout_seconds)
    if not answer.strip():
        return []
    try:
        signatures = [
            Signature(str(row["type"]), int(str(row["offset"]), 0), row.get("label"), row.get("uuid"))
            for row in json.loads(answer)["signatures"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise Unsupported(f"wipefs answered in a form that fvd does not know ({error}); util-linux 2.33 or later is needed") from error
    return sorted(signatures, key=lambda signature: signature.offset_bytes)


def wipe_signatures(target: Node | str | os.PathLike[str], *, timeout_seconds: float = TIMEOUT_SECONDS) -> list[Signature]:
    """Erases the magic bytes of every signature on `target`; returns what there was. The caller must own the target.

    Raises as `find_signatures`; DeviceError if one is still there afterwards.
    """
    before = find_signatures(target, timeout_seconds=timeout_seconds)
    if before:
        # --force: wipefs would otherwise ask for O_EXCL, which the caller's own claim holds, and would leave a partition table.
        _wipefs(target, ["--all", "--force", "--quiet"], timeout_seconds)
        after = find_signatures(target, timeout_seconds=timeout_seconds)
        if after:
            raise DeviceError(f"{_name(target)} still carries {', '.join(map(str, after))} after wipefs --all")
    return before


def _name(target: Node | str | os.PathLike[str]) -> str:
    return target.path if isinstance(target, Node) else os.fspath(target)


def _wipefs(target: Node | str | os.PathLike[str], options: list[str], timeout_seconds: float) -> str:
    name = _name(target)
    import shutil

    program = shutil.which("wipefs", path=_PROGRAM_PATH)
    if program is None:
        raise Unsupported(f"wipefs is needed to see what {name} holds; install util-linux")
    pass_fds: tuple[int, ...] = ()
    path = os.fspath(name)
    if isinstance(target, Node):
        # The open descriptor, not the name: the name may lead elsewhere by now. R35: and it is the claim's, so that the claim lasts as long
        # as a wipefs that outlives us.
        pass_fds = (target.fd,)
        path = f"/proc/self/fd/{target.fd}"
    try:
        done = subprocess.run(
            [program, *options, "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            pass_fds=pass_fds,
            env={"PATH": _PROGRAM_PATH, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Timeout(f"wipefs did not answer within {timeout_seconds:g} s about {name}; is the device stuck?") from error
    except OSError as error:
        raise Unsupported(f"{program} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise DeviceError(f"wipefs {options[0]} failed on {name}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
