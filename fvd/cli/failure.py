# SPDX-License-Identifier: Apache-2.0
"""Errors as a person and a program see them: one clear line, one JSON object, one exit code. Knows no command."""

from __future__ import annotations

import errno
import os
from typing import Any

from fvd.errors import FvdError

PROGRAM = "fvd-lv"
EXIT_OK = 0
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells do
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
_DEEPEST = 20  # errors that have led to one another


def error_line(error: BaseException, volume: str | None) -> str:
    """``fvd-lv: VOLUME: what happened; what to do``, on one line."""
    text = " ".join(describe(error).split())
    if volume and not _names(text, volume):
        text = f"{volume}: {text}"
    return f"{PROGRAM}: {text}"


def error_object(error: BaseException, volume: str | None) -> dict[str, Any]:
    """The ``error`` of a JSON answer."""
    described: dict[str, Any] = {"kind": kind_of(error), "message": describe(error), "exit_code": exit_code_of(error)}
    if volume:
        described["volume"] = volume
    return described


def describe(error: BaseException) -> str:
    if isinstance(error, FvdError):
        return str(error)
    if is_memory_short(error):
        return "there is not enough memory; give this command more (ulimit -v, MemoryMax= of its unit), or end something else"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the command again to finish"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"internal error: {type(error).__name__}: {error}; please report it with the output of --verbose"


def is_memory_short(error: BaseException) -> bool:
    """Whether the system refused memory, in whichever of Python's ways it was told."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    words = ("failed to map segment", "annot allocate memory", "can't start new thread", "cannot enable executable stack")
    return isinstance(error, ImportError | RuntimeError | SystemError) and any(word in str(error) for word in words)


def cause_of(error: BaseException) -> BaseException:
    """What a library has turned into an error of its own: an interrupt that came meanwhile, memory that was refused; else the error."""
    seen: BaseException | None = error
    for _ in range(_DEEPEST):
        if isinstance(seen, KeyboardInterrupt) or (seen is not None and is_memory_short(seen)):
            return seen
        seen = None if seen is None else seen.__cause__ or seen.__context__
    return error


def kind_of(error: BaseException) -> str:
    if isinstance(error, FvdError):
        return error.kind
    return "interrupted" if isinstance(error, KeyboardInterrupt) else FvdError.kind


def exit_code_of(error: BaseException) -> int:
    if isinstance(error, FvdError):
        return error.exit_code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else FvdError.exit_code


def exit_code_table() -> str:
    """Every exit code and what it means, for --help and the manual page."""
    rows: dict[int, str] = {EXIT_OK: "done", EXIT_INTERRUPTED: "Interrupted (Ctrl-C)."}
    errors: list[type[FvdError]] = [FvdError, *_subclasses(FvdError)]
    for error in errors:
        rows.setdefault(error.exit_code, (error.__doc__ or "").strip().splitlines()[0])
    rows[FvdError.exit_code] = "Any other error."
    rows[EXIT_USAGE] = "Wrong usage, or a value that can never work."
    return "\n".join(f"  {code:>3}  {meaning}" for code, meaning in sorted(rows.items()))


def _subclasses(base: type[FvdError]) -> list[type[FvdError]]:
    return [sub for direct in base.__subclasses__() for sub in (direct, *_subclasses(direct))]


def _names(text: str, volume: str) -> bool:
    """Whether a message names the volume, as the user wrote it or by its whole path."""
    path = volume.removeprefix("file:")
    return volume in text or f"{os.path.abspath(path)}" in text  # noqa: PTH100 - text, no file is asked
