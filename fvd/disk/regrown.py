# SPDX-License-Identifier: Apache-2.0
"""What else a device may have become when it grew: what was asked of it at open is asked again, and what has changed is acted upon.

In the loop's thread, before new storage is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from fvd.device.node import Node
from fvd.engine._engine import Engine
from fvd.errors import FvdError
from fvd.units import format_size

log = logging.getLogger(__name__)


class Regrown:
    """Of one open disk. `give_up(why)` stops it."""

    def __init__(self, name: str, node: Node, engine: Engine, give_up: Callable[[str], None]) -> None:
        self._name = name
        self._node = node
        self._engine = engine
        self._give_up = give_up
        self._may_fill = node.stack().may_fill

    def look(self) -> bool:
        """Storage has grown. Whether it may be used; never raises: what cannot be asked now fails by itself, loudly."""
        node, engine = self._node, self._engine
        try:
            if node.block_bytes_now() > engine.align_bytes:
                # The kernel refuses every request that is not made of whole blocks, in the old part of the disk too.
                self._give_up(
                    f"{node.path} has grown onto a device with blocks of {format_size(node.block_bytes_now())}, and is in use with "
                    f"{format_size(engine.align_bytes)}: open it again, and it is used with those"
                )
                return False
            if node.is_read_only_now():
                self._give_up(f"{node.path} has been read-only since it grew; make it writable (blockdev --setrw) and open it again")
                return False
            if not self._may_fill and node.stack().may_fill:
                self._may_fill = True
                engine.expect_enospc()  # R29
                log.warning("%s: since it grew a part of it lies on storage that may run out of space", self._name)
        except FvdError:
            log.debug("%s: what its device is now could not be asked", self._name, exc_info=True)
        return True
