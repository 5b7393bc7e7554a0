# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv serve``: disks over NBD and vhost-user until SIGTERM or SIGINT. Says one line per volume when it is ready, tells systemd, and
closes cleanly."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

import fvd
from fvd.api.served import Served
from fvd.api.serving import QUEUES, ServeOptions
from fvd.cli.activation import take_sockets
from fvd.cli.notify import notify
from fvd.cli.options import (
    ON_OFF,
    VOLUME_HELP,
    Subparsers,
    add_base_allow,
    add_command,
    host_and_port,
    mode,
    refuse_options,
    seconds,
    size,
    whole_number,
)
from fvd.cli.output import Output
from fvd.errors import InvalidArgument
from fvd.modes import CACHE_HELP, CACHE_MODES, ON_FULL

if TYPE_CHECKING:
    from fvd.export.listening import Socket

EXAMPLES = """\
  fvd-lv serve file:vm1.img --socket /run/vm1.sock
  fvd-lv serve vg0/vm1 --vhost-user /run/vm1.vhost
  fvd-lv serve file:vm1.img file:vm2.img --listen localhost:10809
  fvd-lv serve /dev/sdb --socket vm.sock --cache none --on-full error
  fvd-lv serve vg0/vm1 --socket /run/vm1.sock --copy-on-read on --prefetch on --prefetch-rate 50M
  nbdinfo -- [ fvd-lv serve file:vm1.img --read-only ]

When all volumes are ready, prints where each is on a line, its NBD URI or the socket of --vhost-user; prints nothing if it was handed a
socket (LISTEN_FDS). With one volume the empty export name means that volume too. SIGTERM or SIGINT closes the disks cleanly. A second
signal ends the server at once; the next open on this host commits what it had acknowledged."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "serve", "serve disks over NBD and vhost-user", run, EXAMPLES)
    parser.add_argument("volumes", metavar="VOLUME", nargs="+", help=f"{VOLUME_HELP}; clients select one of several by export name")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="listen on a unix socket; not needed if a service manager passes one")
    where.add_argument(
        "--listen", metavar="HOST:PORT", type=host_and_port, help="listen on TCP; no authentication: whoever connects reads and writes"
    )
    parser.add_argument(
        "--vhost-user",
        metavar="PATH",
        help="let guests in by vhost-user at this unix socket, their fastest way; alone or beside NBD. With several volumes, a folder "
        "of sockets NAME.sock",
    )
    parser.add_argument(
        "--queues", metavar="N", type=whole_number, help=f"--vhost-user: as many queues as a guest may have (default {QUEUES})"
    )
    parser.add_argument("--cache", choices=CACHE_MODES, default="none", help=CACHE_HELP)
    parser.add_argument("--read-only", action="store_true", help="clients may only read; the storage is not written")
    parser.add_argument(
        "--on-full",
        choices=ON_FULL,
        default="wait",
        help="when storage is exhausted, an allocating write waits (default) or fails with ENOSPC",
    )
    parser.add_argument(
        "--zero-chunks",
        action="store_true",
        help="let the device zero each new chunk, if it can, so that an allocating write writes only the guest's data, not whole blocks",
    )
    parser.add_argument("--copy-on-read", choices=ON_OFF, help="keep what guests read from the base (default: as provisioned)")
    parser.add_argument(
        "--prefetch",
        choices=ON_OFF,
        help="copy all of the base in the background, yielding to guests (default: as provisioned)",
    )
    parser.add_argument("--prefetch-delay", metavar="S", type=seconds, help="--prefetch on: start after S seconds (default 10)")
    parser.add_argument("--prefetch-rate", metavar="SIZE", type=size, help="--prefetch on: copy at most SIZE a second (default: no limit)")
    parser.add_argument(
        "--profile", metavar="FILE", help="--prefetch on: profile whose extents are copied first (default: beside the base)"
    )
    parser.add_argument(
        "--base-timeout",
        metavar="S",
        type=seconds,
        default=30.0,
        help="retry reads of an unresponsive base for S seconds before failing them (default 30)",
    )
    add_base_allow(parser)
    parser.add_argument(
        "--discard-pending",
        action="store_true",
        help="open a disk whose pending log is missing after its server died; writes that the server had acknowledged are lost "
        "(a log that is found is still used)",
    )
    parser.add_argument("--socket-mode", metavar="MODE", type=mode, default="0600", help="permissions of the unix socket (default 0600)")
    parser.add_argument("--socket-group", metavar="GROUP", help="group of the unix socket, by name or number")


def run(arguments: argparse.Namespace) -> int:
    output = Output(arguments.output)
    refuse_options(arguments, arguments.prefetch != "on", ("prefetch_delay", "prefetch_rate", "profile"), "--prefetch on")
    refuse_options(arguments, arguments.read_only, ("discard_pending",), "serve without --read-only, which is never refused")
    refuse_options(arguments, arguments.vhost_user is None, ("queues",), "--vhost-user")
    sockets = take_sockets()
    _check_where(arguments, sockets)
    with contextlib.closing(_Stop()) as stop:
        return _serve(arguments, output, stop, sockets)


def _check_where(arguments: argparse.Namespace, sockets: list[Socket]) -> None:
    """Raises InvalidArgument unless there is one place to listen at."""
    from fvd.export.listening import unix_path

    if not sockets and arguments.socket is None and arguments.listen is None and arguments.vhost_user is None:
        raise InvalidArgument("give --socket PATH, --listen HOST:PORT or --vhost-user PATH, or start it from a .socket unit of systemd")
    if not sockets:
        return
    if arguments.listen is not None:
        raise InvalidArgument("--listen conflicts with the socket that was passed (LISTEN_FDS): leave out one of the two")
    if arguments.socket is not None and os.path.abspath(arguments.socket) not in [unix_path(one) for one in sockets]:  # noqa: PTH100 - text
        raise InvalidArgument(f"--socket {arguments.socket} is not the socket that was passed (LISTEN_FDS): leave out one of the two")


def _serve(arguments: argparse.Namespace, output: Output, stop: _Stop, sockets: list[Socket]) -> int:

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Whoever asks twice is not kept waiting by storage that does not answer.
        signal.signal(number, signal.SIG_DFL)
        stop.set()
        if stop.opening:  # which may wait: for another owner to go, for a lock of lvm's, for a base
            raise _Asked

    options = ServeOptions(
        socket=None if sockets else arguments.socket,
        listen=arguments.listen,
        listeners=sockets or None,
        vhost_user=arguments.vhost_user,
        queues=QUEUES if arguments.queues is None else arguments.queues,
        cache=arguments.cache,
        read_only=arguments.read_only,
        on_full=arguments.on_full,
        zero_chunks=arguments.zero_chunks,
        copy_on_read=on_or_off(arguments.copy_on_read),
        prefetch=prefetch_of(arguments),
        base_timeout_s=arguments.base_timeout,
        discard_pending=arguments.discard_pending,
        base_allow=arguments.base_allow,
        socket_mode=arguments.socket_mode,
        socket_group=arguments.socket_group,
        on_end=stop.set,
    )
    served = Served(tuple(arguments.volumes), options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    with served:
        try:
            stop.opening = True
            served.open()
            stop.opening = False
            _give_back_memory()
        except _Asked:  # nothing has been said, nobody has been served
            return 0
        exports = [
            {"volume": export.volume, "export": export.name, "uri": export.uri, "vhost_user": export.vhost_user}
            for export in served.exports
        ]
        if not sockets or output.is_json:  # whoever made the socket knows where it is, and may have words of its own on our output
            output.result({"pid": os.getpid(), "volumes": exports}, [export.uri or export.vhost_user or "" for export in served.exports])
        notify(f"READY=1\nSTATUS=serving {', '.join(export.volume for export in served.exports)}\nMAINPID={os.getpid()}")
        stop.wait()
        notify("STOPPING=1")
    return 0


def _give_back_memory() -> None:
    """What only the beginning needed: the parser of the command line, the journal while it was read. A server may be idle for months."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class _Asked(KeyboardInterrupt):
    """A signal asked to end what had not begun to serve."""


class _Stop:
    """Something that is waited for until it is set, by any thread or a signal.

    A signal that comes just before a thread goes to sleep on a lock is seen when the lock is given, that is never; and another thread may
    get it. A pipe holds what was written to it.
    """

    def __init__(self) -> None:
        self.opening = False
        self._set = threading.Event()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)

    def set(self) -> None:
        self._set.set()
        with contextlib.suppress(BlockingIOError):  # full: there is enough to wake anybody
            os.write(self._write_end, b"\0")

    def wait(self) -> None:
        while not self._set.is_set():
            os.read(self._read_end, 64)

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._read_end)
        os.close(self._write_end)


def prefetch_of(arguments: argparse.Namespace) -> fvd.PrefetchOptions | bool | None:
    """What was said about prefetching; None: nothing, so it is as the disk was provisioned."""
    if arguments.prefetch != "on":
        return on_or_off(arguments.prefetch)
    options = fvd.PrefetchOptions()
    return fvd.PrefetchOptions(
        delay_s=options.delay_s if arguments.prefetch_delay is None else arguments.prefetch_delay,
        rate_bytes=arguments.prefetch_rate or 0,
        profile=arguments.profile,
    )


def on_or_off(word: str | None) -> bool | None:
    return None if word is None else word == "on"
