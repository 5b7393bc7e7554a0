# SPDX-License-Identifier: Apache-2.0
"""With whose rights a base is opened: whoever has named it must be entitled to it. For root alone: everybody else has his own rights only.

A superblock is written by whoever may write to the image, and names a base; root, who serves it, could read anything. So:

- Of a logical volume, a tag in its group's metadata says which base it was provisioned over: no guest and no user can write there.
- Of a file, or a device that belongs to a user, the base is opened by him; servers are asked for him not at all.
- What root has named is opened with root's rights, unless its name leads through a user's folder: he could give the name to anything.
- What the administrator's list says, or the command line, is opened for any image.

Knows names and owners; opens no base.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fvd.device.as_user import NOBODY, User, user_of
from fvd.device.claim import loop_backing
from fvd.device.node import Node, typed_errors
from fvd.errors import PermissionDenied
from fvd.format.superblock import BaseReference
from fvd.volume.tags import TAG_BASE

LIST_PATH = "/etc/fvd/bases"
_LIST_BYTES_MAX = 1 << 20
_LINKS_MAX = 40  # as the kernel has it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Namer:
    """Who has said that a disk lies over a base."""

    uid: int | None = 0  # None: it cannot be told, or anybody can have been it
    why: str = ""  # what there is to say about one that is not root
    remedy: str = ""  # beside the list and the option


ROOT = Namer()


def mark_of(reference: BaseReference) -> str:
    """The tag that records on a logical volume what its base is: of the characters that lvm takes, whatever the locator holds."""
    from fvd.digest import sha256

    return TAG_BASE + sha256(f"{int(reference.format)} {reference.locator}".encode()).hex()


def namer_of(volume: str, node: Node, marks: Iterable[str] | None, reference: BaseReference) -> Namer:
    """Who has named the base of an open disk. `marks`: the tags about bases of its logical volume; None: it is none."""
    if marks is not None:
        mark = mark_of(reference)
        if mark in marks:
            return ROOT
        return Namer(
            None,
            f"{volume} was not provisioned over it, as far as its tags say",
            f"lvchange --addtag {mark} {volume} records it" if not set(marks) else "",
        )
    status = os.fstat(node.fd)
    backing = loop_backing(status.st_rdev) if stat.S_ISBLK(status.st_mode) and status.st_uid == 0 else None
    if backing is not None:
        try:
            status = os.stat(backing)  # noqa: PTH116 - the name may hold anything
        except OSError:
            return Namer(None, f"nobody can tell whose the file behind {volume} is")
    if status.st_uid != 0:
        return Namer(status.st_uid, f"{volume} belongs to user {user_of(status.st_uid)}")
    # (Who may write to root's devices, the group disk, may write to all of them.)
    if stat.S_ISREG(status.st_mode) and _others_write(status):
        return Namer(None, f"others than root may write to {volume}")
    return ROOT


def rights_for(locator: str, namer: Namer, allow: Sequence[str] = ()) -> User | None:
    """The user who has to open this base; None: this process may, with its own rights. `allow`: as lines of the administrator's list.

    Raises PermissionDenied, with what to do.
    """
    if os.geteuid() != 0 or any(_matches(line, locator) for line in allow):
        return None
    local = locator.startswith("/")
    uid, why = namer.uid, namer.why
    if uid == 0 and local:
        uid = _user_on_the_way(locator)
        why = "its name leads through a folder in which others than root may write"
    if uid == 0:
        return None
    lines, trouble = _listed()
    if any(_matches(line, locator) for line in lines):
        return None
    if uid is None:
        raise refusal(locator, why, trouble, namer.remedy)
    if not local:
        raise refusal(locator, f"{why}, for whom root asks no server", trouble)
    return user_of(uid)


def writer_of(node: Node) -> User | None:
    """Who can write into a base what he likes, and so have the program that reads it open what he likes; None: nobody but this process's
    user. The members of a group are as nobody is, who is in it."""
    if os.geteuid() != 0:
        return None
    with typed_errors("looking at", node.path):
        status = os.fstat(node.fd)
    if status.st_uid != 0:
        return user_of(status.st_uid)
    if node.is_block or not _others_write(status):
        return None
    return User(NOBODY, NOBODY if status.st_mode & 0o002 else status.st_gid)


def refusal(locator: str, why: str, trouble: str = "", remedy: str = "") -> PermissionDenied:
    return PermissionDenied(
        f"the base {locator} is not opened: {why}. If the disk is to have it, say --base-allow {locator}, or write this line into "
        f"{LIST_PATH}{trouble}: {locator}" + (f" ({remedy})" if remedy else "")
    )


# --- The administrator's list ------------------------------------------------------------------------------------------------------


def _listed() -> tuple[list[str], str]:
    """Its lines, and what is to be said about it."""
    try:
        fd = os.open(LIST_PATH, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return _ignored(f"it cannot be read: {error.strerror}")
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
            return _ignored("it must be a file that belongs to root, and to which nobody else may write")
        text = os.read(fd, _LIST_BYTES_MAX + 1)
    finally:
        os.close(fd)
    if len(text) > _LIST_BYTES_MAX:
        return _ignored("it is too large")
    lines = [line.strip() for line in text.decode(errors="replace").split("\n")]
    return [line for line in lines if line and not line.startswith("#")], ""


def _ignored(why: str) -> tuple[list[str], str]:
    log.error("%s is ignored: %s", LIST_PATH, why)
    return [], f" (which is ignored: {why})"


def _matches(line: str, locator: str) -> bool:
    """Whether a line of the list means this base. A star stands for a part of one name: it crosses no slash, and begins no options."""
    if line == locator:
        return True
    if "*" not in line or not {".", ".."}.isdisjoint(locator.split("/")):
        return False
    return re.fullmatch("[^/?]*".join(map(re.escape, line.split("*"))), locator) is not None


# --- Names ---------------------------------------------------------------------------------------------------------------------------


def _user_on_the_way(path: str) -> int | None:
    """The first user, if not root, who could give this name to something else: in whose folder it or a part of it lies. None: anybody."""
    for folder, entry in _steps(path):
        with contextlib.suppress(OSError):
            status = os.stat(folder)  # noqa: PTH116
            if status.st_uid != 0:
                return status.st_uid
            if _others_write(status):
                if not status.st_mode & stat.S_ISVTX:
                    return None
                uid = os.lstat(entry).st_uid
                if uid != 0:
                    return uid
    return 0


def _steps(path: str) -> Iterator[tuple[str, str]]:
    """The folders in which the parts of a name are looked up, each with the path of that part; links are followed."""
    at, rest, links = "/", [part for part in path.split("/") if part], 0
    while rest:
        part = rest.pop(0)
        there = os.path.join(at, part)  # noqa: PTH118
        if part == "..":
            at = os.path.dirname(at)  # noqa: PTH120
        if part in (".", ".."):
            continue
        yield at, there
        target = ""
        if links < _LINKS_MAX:
            with contextlib.suppress(OSError):
                target = os.readlink(there)  # noqa: PTH115
        if target:
            links += 1
            rest = [piece for piece in target.split("/") if piece] + rest
            at = "/" if target.startswith("/") else at
        else:
            at = there


def _others_write(status: os.stat_result) -> bool:
    return bool(status.st_mode & 0o002 or (status.st_mode & 0o020 and status.st_gid != 0))
