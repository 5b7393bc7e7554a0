# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv attach-info``: what an administrator pastes to give a served disk to a virtual machine. Knows its layout, not its contents."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume
from fvd.cli.output import Output

EXAMPLES = """\
  fvd-lv attach-info file:vm1.img
  fvd-lv attach-info file:vm1.img --format libvirt > disk.xml && virsh attach-device vm1 disk.xml
  fvd-lv attach-info file:vm1.img --output json | jq .blockdev

The disk must be served (fvd-lv serve, or systemctl start fvd@NAME). --output json holds every form, whatever --format says."""

FORMATS: dict[str, tuple[str, Callable[[fvd.AttachInfo], str]]] = {
    "qemu": ("QEMU, when it starts", lambda attachment: attachment.shell_line()),
    "qmp": (
        "QEMU, while it runs (QMP, after qmp_capabilities)",
        lambda attachment: "\n".join(json.dumps(command, ensure_ascii=False) for command in attachment.qmp),
    ),
    "libvirt": ("libvirt", lambda attachment: attachment.libvirt_xml),
    "uri": ("other NBD clients", lambda attachment: attachment.uri),
}


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "attach-info", "show how to attach a served disk to a virtual machine", run, EXAMPLES)
    add_volume(parser)
    parser.add_argument("--format", choices=("all", *FORMATS), default="all", help="print only this form")
    parser.add_argument("--iothread", action="store_true", help="give the disk a thread of its own in QEMU")
    parser.add_argument("--target", metavar="NAME", default="vdb", help="libvirt's name for the disk in the machine (default vdb)")


def run(arguments: argparse.Namespace) -> int:
    attachment = fvd.attach_info(arguments.volume, iothread=arguments.iothread, target=arguments.target)
    if arguments.format == "all":
        parts = [f"# {title}\n{write(attachment)}" for title, write in FORMATS.values()]
        text = "\n\n".join([*parts, "\n".join(f"# Note: {note}" for note in attachment.notes)])
    else:
        text = FORMATS[arguments.format][1](attachment)
    Output(arguments.output).result(asdict(attachment), text)
    return 0
