# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv attach-info``: what an administrator pastes to give a served disk to a virtual machine. Knows its layout, not its contents."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume, size
from fvd.cli.output import Output
from fvd.errors import NotFound

EXAMPLES = """\
  fvd-lv attach-info file:vm1.img
  fvd-lv attach-info file:vm1.img --format libvirt > disk.xml && virsh attach-device vm1 disk.xml
  fvd-lv attach-info file:vm1.img --output json | jq .blockdev

The disk must be served (fvd-lv serve, or systemctl start fvd@NAME). One that is served with --vhost-user is described so, and for NBD too;
--format prints the first, --over nbd the other. --output json holds every form, whatever --format says."""

# Of both ways to a disk.
Described = fvd.AttachInfo | fvd.AttachVhostUser
FORMATS: dict[str, tuple[str, Callable[[Described], str]]] = {
    "qemu": ("QEMU, when it starts", lambda described: described.shell_line()),
    "qmp": (
        "QEMU, while it runs (QMP, after qmp_capabilities)",
        lambda described: "\n".join(json.dumps(command, ensure_ascii=False) for command in described.qmp),
    ),
    "libvirt": ("libvirt", lambda described: described.libvirt_xml),
}
URI = "other NBD clients"
WAYS = ("vhost-user", "nbd")


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "attach-info", "show how to attach a served disk to a virtual machine", run, EXAMPLES)
    add_volume(parser)
    parser.add_argument("--format", choices=("all", *FORMATS, "uri"), default="all", help="print only this form")
    parser.add_argument("--iothread", action="store_true", help="give the disk a thread of its own in QEMU")
    parser.add_argument("--target", metavar="NAME", default="vdb", help="libvirt's name for the disk in the machine (default vdb)")
    parser.add_argument("--over", choices=WAYS, help="print only this way to the disk (default: vhost-user, if it is served so)")
    parser.add_argument("--memory", metavar="SIZE", type=size, default="1G", help="vhost-user: the machine's memory (default 1G)")


def run(arguments: argparse.Namespace) -> int:
    nbd = fvd.attach_info(arguments.volume, iothread=arguments.iothread, target=arguments.target, memory=arguments.memory)
    vhost_user = None if arguments.over == "nbd" else nbd.vhost_user
    if arguments.over == "vhost-user" and vhost_user is None:
        raise NotFound(f"{nbd.volume} is not served by vhost-user; serve it with --vhost-user PATH, or use NBD")
    if not nbd.uri and (arguments.over == "nbd" or arguments.format == "uri"):
        raise NotFound(f"{nbd.volume} is not served over NBD; serve it with --socket or --listen, or use vhost-user")
    if arguments.format == "uri":
        text = nbd.uri
    elif arguments.format == "all":
        text = _everything(None if arguments.over == "vhost-user" or not nbd.uri else nbd, vhost_user)
    else:
        text = FORMATS[arguments.format][1](vhost_user or nbd)
    Output(arguments.output).result(asdict(nbd), text)
    return 0


def _everything(nbd: fvd.AttachInfo | None, vhost_user: fvd.AttachVhostUser | None) -> str:
    parts, notes = [], []
    if vhost_user is not None:
        parts += [*_described(vhost_user, ", vhost-user"), f"# libvirt, in <domain>\n{vhost_user.libvirt_memory_xml}"]
        notes += vhost_user.notes
    if nbd is not None:
        parts += [*_described(nbd, "" if vhost_user is None else ", NBD"), f"# {URI}\n{nbd.uri}"]
        notes += nbd.notes
    return "\n\n".join([*parts, "\n".join(f"# Note: {note}" for note in dict.fromkeys(notes))])


def _described(way: Described, which: str) -> list[str]:
    return [f"# {title}{which}\n{write(way)}" for title, write in FORMATS.values()]
