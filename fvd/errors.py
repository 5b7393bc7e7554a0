# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as types: every error fvd raises on purpose, with the exit code that the command line gives it.

Lowest layer: imports nothing of the project. A message says what happened, to which volume, and what to do.
"""

from __future__ import annotations


def printable(text: str, instead: str = "?") -> str:
    """The text with nothing in it that a terminal would obey."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else instead for sign in text)


def quoted(value: object) -> str:
    """A value as a message shows it: text in quotation marks, with nothing in it that a terminal would obey; of an error its words."""
    if isinstance(value, BaseException):
        reason = getattr(value, "strerror", None) or (value.args[0] if value.args else "no reason given")
        return quoted(str(reason))[1:-1]
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    shown = printable(text)
    return f"'{shown}'" if isinstance(value, str | bytes) else shown


class FvdError(Exception):
    """Base of every error that fvd raises on purpose."""

    exit_code = 1
    kind = "error"


class InvalidArgument(FvdError, ValueError):
    """A value that can never work: a size that is no power of two, a malformed volume name."""

    exit_code = 2
    kind = "invalid_argument"


class NotFound(FvdError):
    """There is no such volume, or the storage holds no fvd disk."""

    exit_code = 3
    kind = "not_found"


class Conflict(FvdError):
    """The volume exists with other parameters, or the storage holds something else."""

    exit_code = 4
    kind = "conflict"


class InUse(FvdError):
    """Someone else has the volume open, mounted or served."""

    exit_code = 5
    kind = "in_use"


class NoSpace(FvdError):
    """The storage is full or cannot hold what was asked for."""

    exit_code = 6
    kind = "no_space"
    left_bytes: int | None = None  # what a group had left when it refused, which is of no use; None: not known


class Corrupt(FvdError):
    """The metadata is damaged, truncated or contradictory; nothing of it was used."""

    exit_code = 7
    kind = "corrupt"


class Unsupported(FvdError):
    """A format feature, device or option that this version does not know or this machine cannot do."""

    exit_code = 8
    kind = "unsupported"


class DeviceError(FvdError):
    """The storage or the base answered with an I/O error."""

    exit_code = 9
    kind = "device_error"


class Forked(DeviceError):
    """What was opened before a fork is the parent's: the child holds nothing of it, and can open it when the parent has closed it."""

    kind = "forked"


class ReadOnly(FvdError):
    """A write to a disk that was opened read-only."""

    exit_code = 10
    kind = "read_only"


class Timeout(FvdError):
    """Something outside did not answer in the stated time."""

    exit_code = 11
    kind = "timeout"


class PermissionDenied(FvdError):
    """The operating system refused access."""

    exit_code = 12
    kind = "permission_denied"


class OutOfMemory(FvdError, MemoryError):
    """The system refused the memory that a disk needs."""

    kind = "out_of_memory"
