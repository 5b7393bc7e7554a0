# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv info``: what a disk is and how full. Knows how to say it, not how it is found out."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

import fvd
from fvd.cli.options import Subparsers, add_command, add_volumes
from fvd.cli.output import moment, share
from fvd.cli.prefetch import progress_text
from fvd.cli.several import Answer, run_each
from fvd.units import GIB, MIB, format_size

if TYPE_CHECKING:
    from fvd import Info

EXAMPLES = """\
  fvd-lv info file:vm1.img
  fvd-lv info file:vm1.img --output json | jq .mapped_bytes
  fvd-lv info vg0/vm1 vg0/vm2 --output json | jq .volumes[].mapped_bytes

Works on a closed disk and on a served one, through its control socket."""

# Rates for which the growth reserve is told in seconds: a busy virtual machine, and one that writes as fast as flash storage can.
WRITE_RATES_BYTES = (100 * MIB, GIB)


def register(subparsers: Subparsers) -> None:
    add_volumes(add_command(subparsers, "info", "show what a disk is and how full", run, EXAMPLES))


def run(arguments: argparse.Namespace) -> int:
    return run_each(arguments, look, apart=True)


def look(volume: str) -> Answer:
    info = fvd.info(volume)
    return asdict(info), [info.volume, *describe_info(info)], 0


def describe_info(info: Info) -> list[str]:
    """The lines under a volume's name."""
    rows = [
        ("virtual size", f"{format_size(info.virtual_size)} ({info.virtual_size} bytes)"),
        ("mapped", f"{format_size(info.mapped_bytes)}, {share(info.mapped_bytes, info.virtual_size)} of the virtual size"),
        ("storage", f"{format_size(info.storage_size)}, {describe_growth(info)}"),
        ("metadata", format_size(info.metadata_size)),
        ("layout", f"{info.layout}, blocks of {format_size(info.block_size)} in chunks of {format_size(info.chunk_size)}"),
        ("journal", format_size(info.journal_size)),
        ("base", f"{info.base.path} ({format_size(info.base.size)}, {info.base.format})" if info.base else "none"),
        *(("" if number else "copies", line) for number, line in enumerate(describe_copies(info))),
        ("state", describe_state(info)),
        *(("possible loss" if number == 0 else "", line) for number, line in enumerate(describe_loss(info))),
        *(("note", line) for line in info.notices),
        *(("failed", line) for line in describe_failure(info)),
        *([("full", "what the storage lies on has no space; free some there, and what waits goes on")] if info.no_room_below else []),
        ("uuid", info.uuid),
        ("created", moment(info.created_seconds)),
        *(("growth so far" if number == 0 else "", line) for number, line in enumerate(describe_steps(info))),
        *(("growth reserve" if number == 0 else "", line) for number, line in enumerate(describe_reserve(info))),
    ]
    return [f"  {label:<16}{text}" for label, text in rows]


def describe_growth(info: Info) -> str:
    most = format_size(info.max_storage_size)
    if info.storage_size >= info.max_storage_size:
        return "as large as it can get"
    if not info.can_grow:
        return f"fixed size; the disk could use {most}"
    return f"grows by {format_size(info.grow_step)} to at most {most} ({info.max_storage_size} bytes)"


def describe_state(info: Info) -> str:
    if info.uri is not None:
        places = [info.uri] if info.uri else []
        if info.vhost_user is not None:
            guests = "no guest" if not info.guests else "1 guest" if info.guests == 1 else f"{info.guests} guests"
            places.append(f"{info.vhost_user} (vhost-user: {guests}, at most {info.queues} queues)")
        return f"served at {' and '.join(places)}" + (f", attached as {info.attached}" if info.attached else "")
    if info.attached:
        return f"attached as {info.attached}, whose requests wait until it is served again"
    if info.pending_changes:
        return (
            f"not clean: its last server died; the next open commits what it had acknowledged ({info.pending_changes} changes of the maps "
            "are in its log)"
        )
    if info.left_open:
        return "not clean: its last server did not close it"
    return "clean" if info.clean else "not clean: the next open replays its journal"


def describe_loss(info: Info) -> list[str]:
    """That acknowledged writes may be gone, and what to do."""
    loss = info.possible_loss
    if loss is None:
        return []
    if info.left_open:
        return [loss.message, "serve the disk, check the guest's data, then acknowledge"]
    since = moment(loss.seconds)
    return [f"since {since}: {loss.message}", f"check the guest's data, then run fvd-lv acknowledge {info.volume}"]


def describe_failure(info: Info) -> list[str]:
    """What an administrator must know of a disk that promises nothing any more."""
    if info.stopped:
        return [info.stopped]
    if not info.failed:
        return []
    when = ""
    if info.failed_seconds is not None:
        when = f" at {moment(info.failed_seconds, 'milliseconds')}"
    whose = f", of {info.failed_source}" if info.failed_source not in ("", info.volume) else ""
    return [f"a flush{whose}{when}: {info.failed_reason}; close the disk, repair the storage, open it again (fvd-lv(1), STORAGE ERRORS)"]


def describe_copies(info: Info) -> list[str]:
    """How the disk is becoming independent of its base."""
    if info.base is None:
        return []
    if info.base_released:
        return ["base: released; all of its data are in the disk"]
    copy_on_read = f"copy-on-read {'on' if info.copy_on_read else 'off'}"
    if info.prefetch is None:
        return [f"{copy_on_read}, prefetching {'on' if info.prefetch_default else 'off'}, unless serve says otherwise"]
    return [copy_on_read, f"prefetching: {progress_text(info.prefetch)}"]


def describe_steps(info: Info) -> list[str]:
    """What growth has done since the disk was opened."""
    growth = info.growth
    if growth is None:
        return []
    lines = []
    if growth.get("extend_steps"):
        steps = growth["extend_steps"]
        text = f"{steps} step{'' if steps == 1 else 's'}, the longest {growth['longest_extend_seconds']:.2f} s"
        suspended = growth.get("longest_suspend_seconds")
        if suspended is not None:
            text += (
                f"; the device was suspended for {suspended * 1000:.1f} ms at most" if suspended else "; the device was not seen suspended"
            )
        lines.append(text)
    if growth.get("extending"):
        lines.append("a step is running")
    if growth.get("last_failure"):
        lines.append(f"last failure: {growth['last_failure']}")
    if growth.get("group") and growth.get("group_free_bytes") is not None:
        lines.append(f"{growth['group']} has {format_size(growth['group_free_bytes'])} left")
    return lines


def describe_reserve(info: Info) -> list[str]:
    """How long allocating writes can continue, at given rates, while storage is being added."""
    if info.low_water_bytes == 0:
        return ["not needed: every chunk has a slot"]
    lines = [
        f"{format_size(info.free_bytes)} free now; a growth step begins when {format_size(info.low_water_bytes)} are left, "
        "and no write waits if the step ends within"
    ]
    for rate in WRITE_RATES_BYTES:
        lines.append(f"  {info.low_water_bytes / rate:.1f} s, at {format_size(rate)}/s of allocating writes")
    return lines
