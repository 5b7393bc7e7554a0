# SPDX-License-Identifier: Apache-2.0
"""Changes that were drawn and change nothing that a guest, an administrator or the disk could tell: why, one by one."""

# ruff: noqa: E501  (lines of the engine are what they are)

EQUIVALENT: dict[str, str] = {
    "read_edges, operand: `if j.guest_end < run_end and not bit_get(e.maps.bitmap, j.end_block - 1):` -> `if not bit_get(e.maps.bitmap, j.end_block - 1):`": (
        "at guest_end == run_end read_from_base is asked for nothing: its start is not below its limit, and it returns"
    ),
    "lower_base_absent, comparison: `if first >= stop:` -> `if first > stop:`": (
        "at first == stop no block is counted; base.absent is not 0 where map_bits calls it, and map_bits_lazily calls it with blocks of the base only"
    ),
    "submit, removed assignment: `r.end = r.start` -> `pass`": (
        "the request is refused at once: request_fail sets its cursor, and nobody looks at its end"
    ),
    "journal_write, operand: `if e.checkpoint.state != CHECKPOINT_IDLE and e.checkpoint.tail_after == 0:` -> `if e.checkpoint.tail_after == 0:`": (
        "tail_after is read when a checkpoint ends, and set anew when one begins: what it is meanwhile decides nothing"
    ),
    "commit_maybe, operand: `if e.commit.state != COMMIT_IDLE or e.failure.error_number or e.mode.read_only or not commit_wanted(e):` -> `if e.commit.state != COMMIT_IDLE or e.failure.error_number or not commit_wanted(e):`": (
        "a read-only open changes nothing, copies nothing and answers flushes at once: no commit is wanted"
    ),
    "slot_take, comparison: `if slot >= e.slots.capacity:` -> `if slot > e.slots.capacity:`": (
        "slots_at_hand is not 0: one is free, or none is and one waits for its discard; each placement finds it, below the capacity"
    ),
    "checkpoint_step, off by one: `cdef uint64_t pages = e.disk.bitmap_pages + e.disk.table_pages` -> `cdef uint64_t pages = (e.disk.bitmap_pages + e.disk.table_pages) + 1`": (
        "one more look behind the last page of the table finds it clean, and the sweep ends there"
    ),
    "resize_storage, comparison: `if e.slots.cursor >= capacity:` -> `if e.slots.cursor > capacity:`": (
        "at the capacity slot_append finds nothing above the cursor, and begins at 0, where the cursor would be"
    ),
    "resize_storage, operand: `if not e.disk.raw and bits_find(e.slots.used, capacity, e.disk.chunks, True) < e.disk.chunks:` -> `if bits_find(e.slots.used, capacity, e.disk.chunks, True) < e.disk.chunks:`": (
        "a raw disk has its whole capacity here, or was refused before: no slot is beyond it"
    ),
}
