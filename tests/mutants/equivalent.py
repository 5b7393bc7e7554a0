# SPDX-License-Identifier: Apache-2.0
"""Changes that were drawn and change nothing that a guest, an administrator or the disk could tell: why, one by one."""

# ruff: noqa: E501  (lines of the engine are what they are)

EQUIVALENT: dict[str, str] = {
    "allocate_begin, operand: `if end < run_end and not bit_get(e.bitmap, last - 1):` -> `if not bit_get(e.bitmap, last - 1):`": (
        "at end == run_end base_read is asked for nothing: its start is not below its limit, and it returns"
    ),
    "base_covered, comparison: `if first >= stop:` -> `if first > stop:`": (
        "at first == stop no block is counted; base_absent is not 0 where map_bits calls it, and soft_bits calls it with blocks of the base only"
    ),
    "submit, removed assignment: `r.end = r.start` -> `pass`": (
        "the request is refused at once: request_fail sets its cursor, and nobody looks at its end"
    ),
    "journal_write, operand: `if e.checkpoint_state != CHECKPOINT_IDLE and e.tail_after == 0:` -> `if e.tail_after == 0:`": (
        "tail_after is read when a checkpoint ends, and set anew when one begins: what it is meanwhile decides nothing"
    ),
    "commit_maybe, operand: `if e.commit_state != COMMIT_IDLE or e.failed_errno or e.read_only or not commit_wanted(e):` -> `if e.commit_state != COMMIT_IDLE or e.failed_errno or not commit_wanted(e):`": (
        "a read-only open changes nothing, copies nothing and answers flushes at once: no commit is wanted"
    ),
}
