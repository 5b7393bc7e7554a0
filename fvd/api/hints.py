# SPDX-License-Identifier: Apache-2.0
"""What to type next, for messages. Pure text: asks nobody."""

from __future__ import annotations

import re
import shlex


def how_to_serve(volume: str) -> str:
    """The command, and the unit, that serve a volume."""
    name = plain_name(volume.rpartition("/")[2]) or "disk"
    return (
        f"run fvd-lv serve {shlex.quote(volume)} --socket /run/fvd/{name}.nbd, "
        f"or write VOLUME={shlex.quote(volume)} into /etc/fvd/{name}.conf and run systemctl start fvd@{name}"
    )


def plain_name(text: str) -> str:
    """What is left of a name for QEMU and systemd."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
