# SPDX-License-Identifier: Apache-2.0
"""The limits: a server that only answers (no server can do more with this client), and fvd's own loop without an engine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from machine import compiled, server
from peers import Peer, Place, Served, disk_device

HERE = Path(__file__).resolve().parent


def pass_through_command(storage: str, place: Place) -> list[str]:
    return [sys.executable, str(HERE / "passthrough.py"), "serve", storage, "--socket", str(place.socket)]


@contextlib.contextmanager
def pass_through(place: Place) -> Iterator[Served]:
    with disk_device(place, 0) as device, server(pass_through_command(device, place), place.socket) as process:
        yield Served(place.socket, (process.pid,), device)


@contextlib.contextmanager
def answers_only(place: Place) -> Iterator[Served]:
    with server([compiled("answer.c"), str(place.socket), str(place.disk_bytes)], place.socket) as process:
        yield Served(place.socket, (process.pid,), "")


def peers() -> list[Peer]:
    return [
        Peer("pass-through", "limit", pass_through, note="fvd's loop without an engine: each request is one operation of the device"),
        Peer("answers only", "limit", answers_only, programs=("gcc",), stores=False, note="stores nothing: as fast as this client can be"),
    ]
