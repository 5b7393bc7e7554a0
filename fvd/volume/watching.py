"""While a disk is open: what udev tells of its device, and of the physical volumes that its growth comes from, reaches the allocator.

Knows neither lvm nor the engine; without udev nothing is told, and the allocator's own looks must do.
"""

from __future__ import annotations

from fvd.device.node import Node
from fvd.device.udev import BlockEvent, BlockWatch
from fvd.volume.allocator import Allocator


def watch_device(node: Node, allocator: Allocator) -> BlockWatch:
    """Begins to watch, where there is something to be watched; `close` ends it."""
    number = node.identity[1] if node.is_block else -1

    def tell(event: BlockEvent) -> None:
        if event.number == number:
            if event.action == "remove":
                allocator.removed(f"{node.path} has been removed from this machine; what was not flushed may be lost")
            else:
                allocator.resized()
        elif event.is_physical_volume and event.action in ("add", "change"):
            # Every change of a group's metadata is written to its physical volumes, and udev tells of it when they are closed.
            allocator.room_made()

    watch = BlockWatch(tell)
    if node.is_block:
        watch.start()
    return watch
