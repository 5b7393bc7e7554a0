# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv``: reads the command line, runs one command, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from fvd import __version__
from fvd.cli import output
from fvd.cli.failure import (
    EXIT_BROKEN_PIPE,
    EXIT_USAGE,
    PROGRAM,
    cause_of,
    error_line,
    error_object,
    exit_code_of,
    exit_code_table,
    is_memory_short,
)
from fvd.cli.options import add_common
from fvd.cli.suggest import guess, guess_volume
from fvd.errors import FvdError, InvalidArgument, NotFound, quoted

# The module of each, which is imported when it is wanted: a server that is idle must not hold the others.
COMMANDS = {
    "provision": "provision",
    "serve": "serve",
    "extend": "extend",
    "info": "info",
    "attach-info": "attach_info",
    "attach": "attach",
    "detach": "detach",
    "events": "events",
    "prefetch": "prefetch",
    "copy-on-read": "copy_on_read",
    "profile": "profile",
    "map": "map_volume",
    "check": "check",
    "acknowledge": "acknowledge",
    "dump": "dump",
    "list": "list_volumes",
    "remove": "remove",
    "torture": "torture",
}

DESCRIPTION = """\
Thin virtual disks on LVM that survive any crash, served over NBD.

VOLUME is VG/LV (a logical volume, which fvd creates and grows), file:PATH (a sparse file in place of a logical volume, which needs no
privileges) or a block device such as /dev/sdb, which does not grow by itself."""


class _Parser(argparse.ArgumentParser):
    """Errors of usage in JSON too, for a program that asked for it."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its parent's, with a guess at what was meant by an option that there is not."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = getattr(arguments, "command", None)
            parser = self.commands.get(command, self) if command else self
            known = [option for action in parser._actions for option in action.option_strings]
            said = [f"there is no {quoted(word)}{guess(word.partition('=')[0], known)}" for word in unknown]
            parser.error("; ".join(said))
        return arguments

    @property
    def commands(self) -> dict[str, _Parser]:
        """The parsers of its commands."""
        return next((dict(action.choices) for action in self._actions if isinstance(action, argparse._SubParsersAction)), {})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        if action.dest == "command":
            meant = guess(str(value), names) or f"; there are {', '.join(names)}"
            raise argparse.ArgumentError(None, f"there is no command {quoted(value)}{meant}")
        raise argparse.ArgumentError(action, f"{quoted(value)} is none of {', '.join(names)}{guess(str(value), names)}")

    def error(self, message: str) -> NoReturn:
        if _wants_json(sys.argv[1:]):
            with contextlib.suppress(OSError):
                _print_error(InvalidArgument(message), None)
        output.say(f"{PROGRAM}: {message}; see {self.prog} --help")
        sys.exit(EXIT_USAGE)


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The whole command line, or that of one command; also what completions and the manual page are compared with."""
    parser = _Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=f"""\
examples:
  fvd-lv provision vg0/vm1 --size 100G
  fvd-lv serve vg0/vm1 --socket vm1.sock
  fvd-lv provision file:vm1.img --size 100G
  fvd-lv serve file:vm1.img --socket vm1.sock
  fvd-lv info file:vm1.img

exit codes:
{exit_code_table()}

Sizes: 64K, 1.5G, 100GiB or bytes; G means GiB. See fvd-lv COMMAND --help, and fvd-lv(1).""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    add_common(parser, default=True)
    parser.set_defaults(output=None)  # as the command has it: text, but of events JSON
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name in COMMANDS if only is None else [only]:
        import_module(f"fvd.cli.{COMMANDS[name]}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Usage errors and --help leave by SystemExit, as argparse does."""
    try:
        words = sys.argv[1:] if argv is None else argv
        arguments = build_parser(words[0] if words and words[0] in COMMANDS else None).parse_args(words)
    finally:
        if (code := _flush()) is not None:  # --help and --version leave by SystemExit
            sys.exit(code)
    notes = logging.StreamHandler()
    notes.setFormatter(output.PlainLines(f"{PROGRAM}: note: %(message)s"))
    logging.basicConfig(handlers=[notes], level=logging.INFO if arguments.verbose else logging.WARNING)
    try:
        done: int = arguments.run(arguments)
        sys.stdout.flush()
        return done
    except BrokenPipeError:
        output.silence(sys.stdout)
        return EXIT_BROKEN_PIPE
    except (FvdError, OSError, MemoryError, KeyboardInterrupt) as error:
        return _fail(error, arguments)
    except Exception as error:
        cause = cause_of(error)
        if cause is error and not is_memory_short(error):  # a bug of ours: the line first, then what a report needs
            traceback.print_exc()
        return _fail(cause, arguments)


def _flush() -> int | None:
    """What was printed reaches its reader; else the exit code."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        output.silence(sys.stdout)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        output.silence(sys.stdout)
        output.say(error_line(error, None))
        return exit_code_of(error)
    return None


def _fail(error: BaseException, arguments: argparse.Namespace) -> int:
    volume = None if isinstance(error, output.OutputFailed) else getattr(arguments, "volume", None)
    if isinstance(error, output.OutputFailed):
        output.silence(sys.stdout)
    elif arguments.output == "json":
        try:
            _print_error(error, volume)
        except OSError:
            output.silence(sys.stdout)
    output.say(error_line(error, volume) + (guess_volume(volume) if volume and isinstance(error, NotFound) else ""))
    return exit_code_of(error)


def _print_error(error: BaseException, volume: str | None) -> None:
    print(json.dumps({"schema_version": output.SCHEMA_VERSION, "error": error_object(error, volume)}, indent=2), flush=True)


def _wants_json(words: Sequence[str]) -> bool:
    return "--output=json" in words or any(pair == ("--output", "json") for pair in itertools.pairwise(words))
