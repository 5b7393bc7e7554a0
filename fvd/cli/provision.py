# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv provision``: make a virtual disk in a volume. Knows the options; what they mean is the API's business."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import fvd
from fvd.cli.info import describe_info
from fvd.cli.options import ON_OFF, Subparsers, add_base_allow, add_command, add_volume, number, size
from fvd.cli.output import Output
from fvd.cli.progress import Progress
from fvd.modes import BASE_FORMATS, LAYOUTS, PLACEMENTS

EXAMPLES = """\
  fvd-lv provision vg0/vm1 --size 100G
  fvd-lv provision vg0/vm1 --size 100G --max-overcommit 3
  fvd-lv provision file:vm1.img --size 100G
  fvd-lv provision file:vm2.img --size 100G --base debian-12.raw
  fvd-lv provision file:vm5.img --base debian-12.raw
  fvd-lv provision vg0/vm3 --size 100G --base nbd://images.example.com/debian-12 --prefetch on
  fvd-lv provision vg0/vm4 --size 100G --base debian-12.qcow2 --base-format qcow2 --copy-on-read on
  fvd-lv provision /dev/sdb --size 500G --layout raw

Repeating the command changes nothing; with other parameters it fails (exit code 4)."""


BASE_HELP = """image that shows through where the disk has no data (QEMU: backing file); never written: the path of a raw file or block
device; an NBD URI (nbd://HOST/EXPORT, nbds://..., nbd+unix:///EXPORT?socket=PATH); or, with --base-format, an image or a URI that QEMU
reads (rbd:..., ssh://..., https://...)"""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "provision", "make a virtual disk in a volume", run, EXAMPLES)
    add_volume(parser)
    parser.add_argument("--size", metavar="SIZE", type=size, help="size of the virtual disk, for example 100G (default: the base's size)")
    parser.add_argument("--base", metavar="IMAGE", help=BASE_HELP)
    parser.add_argument("--truncate-base", action="store_true", help="allow a disk smaller than its base; the guest does not see the rest")
    parser.add_argument("--base-format", choices=BASE_FORMATS, help="format of the base (default raw, or nbd for an NBD URI)")
    add_base_allow(parser)
    parser.add_argument("--copy-on-read", choices=ON_OFF, default="off", help="keep what guests read from the base; serve can override it")
    parser.add_argument("--prefetch", choices=ON_OFF, default="off", help="copy all of the base in the background; serve can override it")
    parser.add_argument("--layout", choices=LAYOUTS, default="compact", help="compact: storage on demand (default); raw: all storage now")
    parser.add_argument("--block-size", metavar="SIZE", type=size, default="64K", help="unit of presence, 4K to 1M (default 64K)")
    parser.add_argument("--chunk-size", metavar="SIZE", type=size, default="1M", help="unit of allocation, 64K to 256M (default 1M)")
    parser.add_argument("--journal-size", metavar="SIZE", type=size, default="16M", help="size of the journal, 64K to 1G (default 16M)")
    parser.add_argument(
        "--grow-step", metavar="SIZE", type=size, default="5G", help="initial storage, and size of a growth step (default 5G)"
    )
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="append",
        help="where new chunks go; append: after the others (default); spread: like a raw disk, as far as storage allows",
    )
    parser.add_argument(
        "--max-overcommit",
        metavar="RATIO",
        type=number,
        help="refuse if the disks' maximum sizes would exceed RATIO x (their volumes + free space); 1: no over-commit",
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite foreign signatures (for example of a file system); overrides nothing else"
    )


def run(arguments: argparse.Namespace) -> int:
    output = Output(arguments.output)
    with Progress("provisioning", enabled=not output.is_json) as progress:
        made = fvd.provision(
            arguments.volume,
            arguments.size,
            base=arguments.base,
            base_format=arguments.base_format,
            copy_on_read=arguments.copy_on_read == "on",
            prefetch=arguments.prefetch == "on",
            truncate_base=arguments.truncate_base,
            layout=arguments.layout,
            block_size=arguments.block_size,
            chunk_size=arguments.chunk_size,
            journal_size=arguments.journal_size,
            grow_step=arguments.grow_step,
            placement=arguments.placement,
            max_overcommit=arguments.max_overcommit,
            base_allow=arguments.base_allow,
            force=arguments.force,
            progress=progress,
        )
    if made.created:
        lines = [f"{arguments.volume}: provisioned", *describe_info(made)]
    else:
        lines = [f"{arguments.volume}: already provisioned with the same parameters; nothing was changed"]
    output.result(asdict(made), lines)
    return 0
