# SPDX-License-Identifier: Apache-2.0
"""What others rely on by name: commands, options and their values, exit codes, JSON keys, event kinds, and the Python API.

`python tests/public_names.py --write` records what there is in public_names.json beside this file. Names are added there with the
feature; one that vanishes is a change that a user's script notices, so test_public_names.py refuses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

RECORD = Path(__file__).with_suffix(".json")


def options_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Of one command: its positional words and options, each with its choices."""
    names: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                names[word] = options_of(inner)
            continue
        key = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        names[key] = sorted(map(str, action.choices)) if action.choices else []
    return names


def parameters_of(function: Any) -> list[str]:
    """``volume``, ``*, size``: names, and which can only be given by name."""
    shown, by_name = [], False
    for each in inspect.signature(function).parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not by_name:
            shown.append("*")
            by_name = True
        shown.append(each.name)
    return shown


def members_of(kind: type) -> dict[str, Any]:
    """Of a class: fields, and the methods that are meant for callers."""
    names: dict[str, Any] = {}
    if dataclasses.is_dataclass(kind):
        names["fields"] = sorted(each.name for each in dataclasses.fields(kind))
    for name, value in inspect.getmembers(kind):
        if not name.startswith("_") and value is not None and name not in names.get("fields", ()):
            if inspect.isfunction(value):
                names[f"{name}()"] = parameters_of(value)
            elif isinstance(value, property):
                names[name] = "property"
    return names


def api_of(module: Any) -> dict[str, Any]:
    """Of a module: what its ``__all__`` names."""
    names: dict[str, Any] = {}
    for name in module.__all__:
        value = getattr(module, name)
        if get_args(value):
            names[name] = sorted(map(str, get_args(value)))
        elif isinstance(value, type):
            names[name] = members_of(value)
        elif callable(value):
            names[f"{name}()"] = parameters_of(value)
    return names


def public_names() -> dict[str, Any]:
    """All of it, as plain values."""
    modules: list[Any] = [importlib.import_module(name) for name in ("fvd", "fvd.aio", "fvd.errors")]
    fvd, aio, errors = modules
    kinds_of_errors: list[Any] = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.FvdError)]
    main, output, kinds = (importlib.import_module(name) for name in ("fvd.cli.main", "fvd.cli.output", "fvd.api.events"))
    return {
        "schema_version": [str(output.SCHEMA_VERSION)],
        "commands": options_of(main.build_parser()),
        "errors": {each.__name__: [each.kind, str(each.exit_code)] for each in kinds_of_errors},
        "events": sorted(get_args(kinds.EventKind)),
        "fvd": api_of(fvd),
        "fvd.aio": api_of(aio),
    }


def vanished(before: Any, now: Any, where: str = "") -> list[str]:
    """What was there before and is not now."""
    if isinstance(before, dict):
        if not isinstance(now, dict):
            return [where]
        return [
            line
            for name, value in before.items()
            for line in (vanished(value, now[name], f"{where} {name}".strip()) if name in now else [f"{where} {name}".strip()])
        ]
    if isinstance(before, list):
        # An option without choices has an empty list: one that then takes only some words is a change too.
        if not before and now:
            return [f"{where}: any value"]
        return [f"{where} {value}" for value in before if value not in now]
    return [] if before == now else [f"{where} {before}"]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/public_names.py --write")
    RECORD.write_text(json.dumps(public_names(), indent=1, sort_keys=True) + "\n")
