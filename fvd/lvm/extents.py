# SPDX-License-Identifier: Apache-2.0
"""Where a linear logical volume lies on its physical volumes, as lvm2 reports it. Pure: runs nothing, opens nothing.

So an inactive volume can be read without being activated, which a mere look at a group must not do.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from fvd.errors import Unsupported, quoted

SEGMENT_FIELDS = "vg_name,lv_name,lv_uuid,segtype,seg_start,seg_size,seg_pe_ranges,vg_extent_size"
PHYSICAL_FIELDS = "pv_name,pe_start"
_RANGE = re.compile(r"(?P<device>/.+):(?P<first>\d+)-(?P<last>\d+)")


@dataclass(frozen=True)
class Piece:
    """A part of a logical volume that lies in one piece. Bytes."""

    start: int  # in the logical volume
    length: int
    device: str  # of the physical volume
    offset: int  # there


def parse_pieces(segments: str, physical: str) -> dict[str, list[Piece]]:
    """By the volume's UUID: its pieces in order. A volume that is not linear throughout is left out. Raises Unsupported."""
    try:
        starts = {row["pv_name"]: int(row["pe_start"]) for part in json.loads(physical)["report"] for row in part["pv"]}
        by_uuid: dict[str, list[Piece]] = {}
        others = set()
        for row in (row for part in json.loads(segments)["report"] for row in part.get("seg", [])):
            match = _RANGE.fullmatch(row["seg_pe_ranges"])
            if row["segtype"] != "linear" or match is None or match["device"] not in starts:
                others.add(row["lv_uuid"])
                continue
            offset = starts[match["device"]] + int(match["first"]) * int(row["vg_extent_size"])
            by_uuid.setdefault(row["lv_uuid"], []).append(Piece(int(row["seg_start"]), int(row["seg_size"]), match["device"], offset))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"lvm2 answered in a form that fvd does not know ({quoted(error)}); lvm2 2.03.12 or later is needed") from error
    return {
        uuid: pieces for uuid, pieces in ((uuid, _in_order(pieces)) for uuid, pieces in by_uuid.items() if uuid not in others) if pieces
    }


def _in_order(pieces: list[Piece]) -> list[Piece]:
    """The pieces, if they cover the volume without a gap."""
    pieces = sorted(pieces, key=lambda piece: piece.start)
    end = 0
    for piece in pieces:
        if piece.start != end:
            return []
        end += piece.length
    return pieces
