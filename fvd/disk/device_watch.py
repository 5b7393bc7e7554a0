# SPDX-License-Identifier: Apache-2.0
"""While a disk is open: what is told of its device, and of the physical volumes that its growth comes from, reaches those whom it concerns.

Knows neither lvm nor the engine. Of its own device the kernel itself tells, so no udev that is stuck or absent is in the way of that.
"""

from __future__ import annotations

from fvd.device.node import Node
from fvd.device.udev import BlockEvent, BlockWatch
from fvd.disk.holding import Holding
from fvd.storage.allocator import Allocator


def watch_device(node: Node, holding: Holding, allocator: Allocator | None) -> BlockWatch:
    """Begins to watch, where there is something to be watched; `close` ends it. `allocator`: None for a disk that is only read."""
    number = node.identity[1] if node.is_block else -1

    def tell(event: BlockEvent) -> None:
        if event.number == number:
            if event.action != "remove":
                holding.look()  # first: it must not go on for the time of a look at its size
            if allocator is None:
                return
            if event.action == "remove":
                allocator.removed(f"{node.path} has been removed from this machine; what was not flushed may be lost")
            else:
                allocator.resized()
        elif allocator is None:
            return
        elif event.is_physical_volume and event.action in ("add", "change"):
            # Every change of a group's metadata is written to its physical volumes, and udev tells of it when they are closed.
            allocator.on_space_freed()

    watch = BlockWatch(tell, number)
    if node.is_block:
        watch.start()
    return watch
