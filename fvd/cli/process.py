# SPDX-License-Identifier: Apache-2.0
"""The command as a process: its standard streams, which may be closed or full, and Ctrl-C, at whatever moment. Knows no command.

A result that cannot be written is an error with one line; a reader that has gone (``| head -1``) is none to speak of. The first Ctrl-C
undoes what is under way (KeyboardInterrupt), a second one ends the process at once.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from fvd.cli.output import OutputFailed, silence

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def run() -> int:
    """Runs the command line of this process; returns its exit code."""
    open_streams()
    # Nothing here multiplies matrices: numpy's library need not start a thread for each processor, each with memory of its own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from fvd.cli.main import main

        if (
            "serve" not in sys.argv[1:]
        ):  # which must not hold it; others may come to it, and its import says strange things when interrupted
            import numpy as _  # noqa: F401

        # Until here SIGINT was the system's: whoever interrupts an import ends the process.
        with Interruptible():
            try:
                return main()
            finally:
                finish_output()
    except KeyboardInterrupt:  # before a command had begun, or after its end
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        raise


# --- Streams -------------------------------------------------------------------------------------------------------------------


def open_streams() -> None:
    """Three open standard streams, whatever the caller has closed: no disk shall be opened as descriptor 1, and be printed to."""
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):  # 1: writing to it fails, as it should
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != fd:  # the lowest number that is free: ours
                os.dup2(opened, fd)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the process's own
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.stdout = _stdout(sys.stdout)
    logging.raiseExceptions = False  # a stderr that cannot be written: there is nobody to tell


def finish_output() -> None:
    """Nothing is left for the interpreter to write, and to complain about, when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


class _Raw(io.FileIO):
    """Standard output, whose errors are told apart from those of a disk."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFailed(f"standard output cannot be written: {os.strerror(error.errno or 0)}") from error


def _stdout(inherited: TextIO | None) -> TextIO:
    raw = _Raw(1, "w", closefd=False)
    # A name that the terminal's encoding lacks is shown somehow, rather than ending the command.
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=inherited.encoding if inherited is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=raw.isatty(),
    )


# --- Ctrl-C --------------------------------------------------------------------------------------------------------------------


class Interruptible:
    """While it is entered, the first Ctrl-C raises KeyboardInterrupt; any other ends the process as the shell expects, by the signal."""

    def __enter__(self) -> Interruptible:
        self._hook = sys.unraisablehook
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            sys.unraisablehook = self._unraisable
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._before)
            sys.unraisablehook = self._hook

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    def _unraisable(self, unraisable: UnraisableHookArgs) -> None:
        """An interrupt that came where nothing can be raised, in a destructor, say, is one all the same."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            finish_output()
            signal.raise_signal(signal.SIGINT)
        self._hook(unraisable)
