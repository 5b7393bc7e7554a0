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
    found = fvd.info(volume)
    return asdict(found), [found.volume, *describe_info(found)], 0


def describe_info(found: Info) -> list[str]:
    """The lines under a volume's name."""
    rows = [
        ("virtual size", f"{format_size(found.virtual_size)} ({found.virtual_size} bytes)"),
        ("mapped", f"{format_size(found.mapped_bytes)}, {share(found.mapped_bytes, found.virtual_size)} of the virtual size"),
        ("storage", f"{format_size(found.storage_size)}, {describe_growth(found)}"),
        ("metadata", format_size(found.metadata_size)),
        ("layout", f"{found.layout}, blocks of {format_size(found.block_size)} in chunks of {format_size(found.chunk_size)}"),
        ("journal", format_size(found.journal_size)),
        ("base", f"{found.base.path} ({format_size(found.base.size)}, {found.base.format})" if found.base else "none"),
        *(("" if number else "copies", line) for number, line in enumerate(describe_copies(found))),
        ("state", describe_state(found)),
        *(("possible loss" if number == 0 else "", line) for number, line in enumerate(describe_loss(found))),
        *(("note", line) for line in found.notices),
        *(("failed", line) for line in describe_failure(found)),
        *([("full", "what the storage lies on has no room; make some there, and what waits goes on")] if found.no_room_below else []),
        ("uuid", found.uuid),
        ("created", moment(found.created_seconds)),
        *(("growth so far" if number == 0 else "", line) for number, line in enumerate(describe_steps(found))),
        *(("growth reserve" if number == 0 else "", line) for number, line in enumerate(describe_reserve(found))),
    ]
    return [f"  {label:<16}{text}" for label, text in rows]


def describe_growth(found: Info) -> str:
    most = format_size(found.max_storage_size)
    if found.storage_size >= found.max_storage_size:
        return "as large as it can get"
    if not found.can_grow:
        return f"fixed size; the disk could use {most}"
    return f"grows by {format_size(found.grow_step)} to at most {most} ({found.max_storage_size} bytes)"


def describe_state(found: Info) -> str:
    if found.uri:
        return f"served at {found.uri}"
    if found.pending_changes:
        return (
            f"not clean: its last server died; the next open commits what it had acknowledged ({found.pending_changes} changes of the maps "
            "are in its log)"
        )
    if found.left_open:
        return "not clean: its last server did not close it"
    return "clean" if found.clean else "not clean: the next open replays its journal"


def describe_loss(found: Info) -> list[str]:
    """That acknowledged writes may be gone, and what to do."""
    loss = found.possible_loss
    if loss is None:
        return []
    if found.left_open:
        return [loss.message, "serve the disk, check the guest's data, then acknowledge"]
    since = moment(loss.seconds)
    return [f"since {since}: {loss.message}", f"check the guest's data, then run fvd-lv acknowledge {found.volume}"]


def describe_failure(found: Info) -> list[str]:
    """What an administrator must know of a disk that promises nothing any more."""
    if found.stopped:
        return [found.stopped]
    if not found.failed:
        return []
    when = ""
    if found.failed_seconds is not None:
        when = f" at {moment(found.failed_seconds, 'milliseconds')}"
    whose = f", of {found.failed_source}" if found.failed_source not in ("", found.volume) else ""
    return [f"a flush{whose}{when}: {found.failed_reason}; close the disk, repair the storage, open it again (fvd-lv(1), STORAGE ERRORS)"]


def describe_copies(found: Info) -> list[str]:
    """How the disk is becoming independent of its base."""
    if found.base is None:
        return []
    if found.base_released:
        return ["base: released; all of its data are in the disk"]
    copy_on_read = f"copy-on-read {'on' if found.copy_on_read else 'off'}"
    if found.prefetch is None:
        return [f"{copy_on_read}, prefetching {'on' if found.prefetch_default else 'off'}, unless serve says otherwise"]
    return [copy_on_read, f"prefetching: {progress_text(found.prefetch)}"]


def describe_steps(found: Info) -> list[str]:
    """What growth has done since the disk was opened."""
    growth = found.growth
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


def describe_reserve(found: Info) -> list[str]:
    """How long allocating writes can continue, at given rates, while storage is being added."""
    if found.low_water_bytes == 0:
        return ["not needed: every chunk has a slot"]
    lines = [
        f"{format_size(found.free_bytes)} free now; a growth step begins when {format_size(found.low_water_bytes)} are left, "
        "and no write waits if the step ends within"
    ]
    for rate in WRITE_RATES_BYTES:
        lines.append(f"  {found.low_water_bytes / rate:.1f} s, at {format_size(rate)}/s of allocating writes")
    return lines
