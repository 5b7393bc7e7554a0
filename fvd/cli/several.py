# SPDX-License-Identifier: Apache-2.0
"""A command for several volumes, one after the other, whatever becomes of each; for one it answers as it always did. Knows no verb."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fvd.cli.failure import error_line, error_object, exit_code_of
from fvd.cli.output import Output, OutputFailed, say
from fvd.cli.suggest import guess_volume
from fvd.errors import FvdError, NotFound

# What a verb found out about one volume: for programs, for people, and its exit code.
Answer = tuple[dict[str, Any], list[str], int]


def run_each(arguments: argparse.Namespace, verb: Callable[[str], Answer], *, apart: bool = False) -> int:
    """Runs the verb on each of ``arguments.volumes``; returns the highest exit code. ``apart``: with an empty line between two texts."""
    output = Output(arguments.output)
    if len(arguments.volumes) == 1:
        arguments.volume = arguments.volumes[0]  # whose error it is
        payload, lines, code = verb(arguments.volume)
        output.result(payload, lines)
        return code
    worst = 0
    answers: list[dict[str, Any]] = []
    for number, volume in enumerate(arguments.volumes):
        try:
            payload, lines, code = verb(volume)
        except (FvdError, OSError) as error:
            if isinstance(error, OutputFailed | BrokenPipeError):
                raise
            payload, lines, code = {"volume": volume, "error": error_object(error, volume)}, [], exit_code_of(error)
            say(error_line(error, volume) + (guess_volume(volume) if isinstance(error, NotFound) else ""))
        answers.append(payload)
        worst = max(worst, code)
        if not output.is_json and lines:
            output.result({}, [*([""] if apart and number else []), *lines])
    if output.is_json:
        output.result({"volumes": answers}, [])
    return worst
