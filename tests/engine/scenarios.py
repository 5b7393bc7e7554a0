# SPDX-License-Identifier: Apache-2.0
"""Directed scenarios for the rules that random play meets too rarely. Each raises when its rule is broken, and passes when it is kept."""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Any

from devtools._queue_driver import QueueDriver
from fvd._core import Bug
from fvd.sim._device import BASE, DISCARD, FLUSH, READ, WRITE, ZERO, Operation
from fvd.sim._oracle import SECTOR_BYTES, Violation
from fvd.sim.stage import SECTORS_PER_BLOCK, SECTORS_PER_CHUNK, Stage


def checkpoint_during_pending_change() -> None:
    """R11: a change is pending while a checkpoint encodes its page; then power fails before the change is committed."""
    for _ in range(8):
        stage = Stage(virtual_size_bytes=8 << 20)
        for number in range(7):
            stage.now("write", number * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
            stage.now("flush")
        stage.now("write", 8 * SECTORS_PER_BLOCK, 8)
        stage.submit("flush", 0, 0)
        stage.finish_all(but=lambda op: op.kind == WRITE and op.durable)
        # The eighth commit's journal write is under way: a block becomes present now, too late for it. Its bit is in a word that no
        # commit names, so no replay would repair it.
        cookie = stage.submit("write", 100 * SECTORS_PER_BLOCK, 8)
        stage.finish_all(but=lambda op: op.kind == WRITE and op.durable)
        if cookie in stage.in_flight or stage.counts()["checkpoints"]:
            raise RuntimeError("the scenario no longer fits the engine")
        stage.finish_all(but=lambda op: False)
        if not stage.counts()["checkpoints"]:
            raise RuntimeError("no checkpoint: the scenario no longer fits the engine")
        stage.crash()


def slot_reuse_under_a_read() -> None:
    """R6: a read of a slot is still in flight when its chunk is trimmed, and the only free slot is that one."""
    stage = Stage(storage_chunks=1)
    stage.now("write", 0, SECTORS_PER_CHUNK)
    stage.now("flush")
    stage.submit("read", 0, 8)
    stage.submit("trim", 0, SECTORS_PER_CHUNK)
    stage.submit("flush", 0, 0)
    stage.finish_all(but=lambda op: op.kind == READ)
    stage.submit("write", SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
    stage.finish_all(but=lambda op: op.kind == READ)
    stage.finish_all()
    stage.settle()


def trim_under_a_write() -> None:
    """R7: an overwrite is in flight when its block is trimmed and written again elsewhere; what it leaves must not come back."""
    stage = Stage()
    stage.now("write", 0, 2 * SECTORS_PER_BLOCK)
    stage.now("flush")
    stage.submit("write", 0, 8)
    (slow,) = stage.pending()
    stage.submit("trim", 0, SECTORS_PER_BLOCK)
    stage.submit("write", 64, 8)
    for operation in stage.pending(lambda op: op is not slow):
        stage.effect(operation)
    stage.finish(slow)  # acknowledged, after its block was trimmed
    stage.submit("read", 0, 8)
    stage.finish_all()
    stage.now("read", 0, 8)
    stage.settle()


def ring_full_behind_a_slow_checkpoint() -> None:
    """R4: the checkpoint does not end; commits must wait rather than overwrite what its end would make free."""
    for _ in range(4):
        stage = Stage()

        def in_maps(op: Operation, stage: Stage = stage) -> bool:
            offset = op.offset_bytes
            geometry = stage.geometry
            return op.kind == WRITE and geometry.bitmap_offset_bytes <= offset < geometry.data_offset_bytes

        for number in range(60):
            stage.submit("zero" if number % 2 else "write", 0, SECTORS_PER_BLOCK)
            stage.submit("flush", 0, 0)
            stage.finish_all(but=in_maps)
        stage.crash()


def base_given_up_before_that_is_durable() -> None:
    """R36: the guest has written everything that the base reaches, and no commit says so yet."""
    stage = Stage(base_bytes=1 << 20)
    stage.now("write", 0, 2048)
    if stage.engine.base_released:
        raise Violation("the base is given up before the commit of its last sector")
    stage.crash()
    stage.now("write", 0, 2048)
    stage.now("flush")
    if not stage.engine.base_released:
        raise Violation("every sector of the base is here, and it is kept")
    stage.settle()


def failed_flush_is_remembered() -> None:
    """R10: the device fails one flush; the next one would succeed."""
    stage = Stage()
    stage.now("write", 0, 8)
    failed: list[Operation] = []

    def fault(op: Operation) -> int:
        if op.kind == FLUSH and not failed:
            failed.append(op)
            return -errno.EIO
        return 0

    stage.player.errors_expected = True
    stage.device.fault = fault
    stage.now("flush")
    stage.now("flush")
    stage.now("write", 0, 8)


def write_without_space_below_the_storage() -> None:
    """R40: the device has no space for a guest's write, and has some two seconds later: the write ends then, by itself."""
    stage = Stage()
    full = True

    def fault(op: Operation) -> int:
        return -errno.ENOSPC if full and op.kind == WRITE and op.offset_bytes >= stage.geometry.data_offset_bytes else 0

    stage.device.fault = fault
    cookie = stage.submit("write", 0, SECTORS_PER_BLOCK)
    stage.finish_all()
    if cookie not in stage.in_flight:
        raise Violation("a write that finds no space below the storage is not held")
    full = False
    stage.device.advance(2_000_000_000)
    stage.finish_all()
    if cookie in stage.in_flight:
        raise Violation("a write that waits for space below the storage of its slot is not tried again")
    stage.settle()


def write_into_a_chunk_being_trimmed() -> None:
    """A trim of a whole chunk waits for a write in flight; a first write to another block of it must not join the slot that goes."""
    stage = Stage()
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.submit("write", 0, 8)
    (slow,) = stage.pending()
    stage.submit("trim", 0, SECTORS_PER_CHUNK)
    stage.submit("write", SECTORS_PER_BLOCK, 8)
    stage.finish_all(but=lambda op: op is slow)
    stage.finish_all()
    stage.now("read", 0, SECTORS_PER_CHUNK)
    stage.now("flush")
    stage.crash()


def write_beside_a_trim_of_the_last_block() -> None:
    """R7: a trim of the only present block of a chunk waits for a write in flight there; it will free the slot. A first write to another
    block of the chunk comes meanwhile, and must not join it."""
    stage = Stage()
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.submit("write", 0, 8)
    (slow,) = stage.pending()
    stage.submit("trim", 0, SECTORS_PER_BLOCK)
    joins = stage.submit("write", SECTORS_PER_BLOCK, 8)
    (other,) = stage.pending(lambda op: op is not slow) or (None,)
    stage.finish(slow)
    stage.finish_all(but=lambda op: op is other)
    if other is not None:
        stage.finish(other)
    stage.finish_all()
    if joins in stage.in_flight:
        raise Violation("a write beside a trim did not end")
    stage.now("read", 0, 2 * SECTORS_PER_BLOCK)
    stage.now("flush")
    stage.crash()


def close_reaches_a_full_storage() -> None:
    """A write that waits for another one to end when the disk is closed, and only then finds the storage full: nobody grows it now."""
    stage = Stage(storage_chunks=1)
    stage.submit("write", SECTORS_PER_CHUNK - 8, 8)
    stage.submit("write", SECTORS_PER_CHUNK - 4, 8)
    stage.close(at_once=True)


def slot_being_discarded_is_not_a_full_storage() -> None:
    """With on_full=error a write finds every slot taken, but one is free as soon as its discard has ended."""
    stage = Stage(virtual_size_bytes=2 << 18, on_full="error", discard=True)
    stage.now("write", 0, 2 * SECTORS_PER_CHUNK)
    stage.submit("trim", 0, SECTORS_PER_CHUNK)
    stage.submit("flush", 0, 0)
    stage.finish_all(but=lambda op: op.kind == DISCARD)
    (discard,) = stage.pending()
    waiting = stage.submit("write", 0, 8)
    if stage.pending() != [discard] or waiting not in stage.in_flight:
        raise RuntimeError("the scenario no longer fits the engine")
    stage.finish_all()
    stage.settle()


def trim_behind_a_stream_of_small_writes() -> None:
    """Liveness: unaligned writes that never stop, each to another block of the chunk, must not keep a trim waiting for ever."""
    stage = Stage(logical_block_bytes=4096)
    stage.now("write", 0, SECTORS_PER_CHUNK)
    stage.submit("write", 1, 1)
    first = stage.pending()
    trim = stage.submit("trim", 0, SECTORS_PER_CHUNK)
    stage.submit("write", SECTORS_PER_BLOCK + 1, 1)
    while first:
        stage.finish(first[0])
        first = [op for op in stage.pending() if op.offset_bytes < stage.geometry.data_offset_bytes + 4096]
    if trim in stage.in_flight:
        raise Violation("a trim waits behind a write that came after it")
    stage.settle()


def durable_write_under_way_at_a_failed_flush() -> None:
    """R10, in a page-cache mode: a write is in the cache when a flush fails; the kernel may drop its page with that flush, calls it clean,
    and has no second error to give to the write."""
    log: list[str] = []
    stage = Stage(cache_mode="writethrough", log=log)
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.player.errors_expected = True
    stage.submit("write", 0, 8)
    (write,) = stage.pending()
    stage.effect(write)
    stage.device.fault = lambda op: -errno.EIO if op.kind == FLUSH else 0
    stage.submit("flush")
    stage.finish_all(but=lambda op: op is write)
    stage.finish(write)
    if f"done 2: write {-errno.EIO}" not in log:
        raise Violation(f"a durable write was acknowledged after a flush had failed: {log[-1]}")


def guest_write_beside_a_copy_in_a_pending_word() -> None:
    """R15: zeros by their bits have made a word pending; a copy maps the slot of their chunk softly and is still being saved when a guest's
    write to another block of that word is done, and a flush. The bits of the write never reach the journal without their slot."""
    stage = Stage(base_bytes=1 << 20)
    stage.engine.copy_on_read = True
    stage.now("zero", 2 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    stage.submit("read", 0, 8)
    stage.finish(*stage.pending(lambda op: op.target == BASE))
    (fill,) = stage.pending()
    write = stage.submit("write", 3 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    stage.finish(fill)
    save = min(stage.pending(lambda op: op.kind == WRITE), key=lambda op: op.offset_bytes)
    stage.finish_all(but=lambda op: op is save)
    flush = stage.submit("flush")
    stage.finish_all(but=lambda op: op is save)
    if write in stage.in_flight or flush in stage.in_flight:
        raise RuntimeError("the scenario no longer fits the engine")
    stage.crash()


def guest_write_over_copies_in_two_words() -> None:
    """R14: blocks on both sides of a border between two words of the bitmap have been copied; a guest writes to them, and flushes."""
    block_bytes, border = 4096, 64
    sectors = block_bytes // SECTOR_BYTES
    stage = Stage(base_bytes=1 << 20, block_size_bytes=block_bytes, chunk_size_bytes=1 << 20, grow_step_bytes=1 << 20)
    stage.engine.copy_on_read = True
    stage.now("read", (border - 2) * sectors, 4 * sectors)
    stage.engine.copy_on_read = False
    stage.now("write", (border - 1) * sectors, 2 * sectors)
    counts = stage.counts()
    if (counts["allocations"], counts["base_reads"], counts["device_writes"]) != (0, 1, 2):
        raise RuntimeError("the scenario no longer fits the engine")
    stage.now("flush")
    stage.crash()


def write_over_zeros_beside_another_write() -> None:
    """R8: a block is zeros by its bit, in a chunk without a slot. A write to it is under way when another block of the chunk has been
    written and flushed; then power fails. The block is zeros still, and no read shows anything else meanwhile."""
    stage = Stage(base_bytes=1 << 20)
    stage.now("zero", 2 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    stage.now("flush")
    stage.submit("write", 2 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    (slow,) = stage.pending()
    stage.submit("write", 0, SECTORS_PER_BLOCK)
    stage.finish_all(but=lambda op: op is slow)
    stage.submit("flush")
    stage.submit("read", 2 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    stage.finish_all(but=lambda op: op is slow)
    stage.crash()


def _two_durable_writes(stage: Stage) -> tuple[int, int, Operation, Operation]:
    """Two durable writes of committed blocks, both in the device."""
    stage.now("write", 0, 2 * SECTORS_PER_BLOCK)
    stage.now("flush")
    stage.player.errors_expected = True
    first = stage.submit("write", 0, 8, fua=True)
    second = stage.submit("write", SECTORS_PER_BLOCK, 8, fua=True)
    one, other = stage.pending()
    if not (one.durable and other.durable):
        raise RuntimeError("the scenario no longer fits the engine")
    return first, second, one, other


def durable_write_beside_one_that_fails() -> None:
    """R26: a durable write ends well beside another, which fails: that one may have taken the report of what the first did not reach."""
    log: list[str] = []
    stage = Stage(log=log)
    first, _, one, other = _two_durable_writes(stage)
    stage.finish(one)
    if first not in stage.in_flight:
        raise Violation("a durable write counted while another was in flight that may have taken its flush's report")
    stage.effect(other)
    other.result = -errno.EIO
    stage.finish(other)
    if f"done {first >> 20}: write {-errno.EIO}" not in log:
        raise Violation(f"a durable write was acknowledged beside one that took the flush's report: {log[-1]}")


def flush_beside_one_that_fails() -> None:
    """R26: the flush of a commit ends well while a durable write is in flight, which then fails."""
    stage = Stage()
    _, _, one, other = _two_durable_writes(stage)
    flush = stage.submit("flush")
    stage.finish_all(but=lambda op: op in (one, other))
    if flush not in stage.in_flight:
        raise Violation("a flush was answered while durable writes were in flight that may have taken its report")
    stage.effect(one)
    one.result = -errno.EIO
    stage.finish(one)
    if flush in stage.in_flight:
        raise Violation("a flush that was held back is not answered when it can no longer succeed")
    stage.finish_all()
    stage.settle()


def journal_write_beside_a_durable_write() -> None:
    """R26: a commit's journal write has ended well, and a durable write that was in flight then fails: nothing is committed."""
    stage = Stage()
    _, _, one, other = _two_durable_writes(stage)
    stage.finish(other)
    stage.submit("write", 600, 8)
    stage.finish_all(but=lambda op: op is one or op is other)
    before = stage.counts()["commits"]
    flush = stage.submit("flush")
    stage.finish_all(but=lambda op: op is one)
    if stage.counts()["commits"] != before or flush not in stage.in_flight:
        raise Violation("a commit counts while a durable write is in flight that may have taken its flush's report")
    stage.finish(one)
    stage.finish_all()
    if stage.counts()["commits"] != before + 1 or flush in stage.in_flight:
        raise Violation("a commit does not go on when everything that it was held back for has ended well")
    stage.crash()


def three_durable_writes_in_the_order_of_their_ends() -> None:
    """R26: the first to end waits for the two that were in flight then, not for one of them only; and not for one that came later."""
    stage = Stage()
    first, _, one, other = _two_durable_writes(stage)
    third = stage.submit("write", 16, 8, fua=True)
    (last,) = stage.pending(lambda op: op is not one and op is not other)
    stage.finish(one)
    stage.finish(other)
    if first not in stage.in_flight:
        raise Violation("a durable write counted before the last was in that was in flight when it ended: that may take its flush's report")
    fourth = stage.submit("write", 32, 8, fua=True)
    (later,) = stage.pending(lambda op: op is not last)
    stage.finish(last)
    if first in stage.in_flight or third not in stage.in_flight:
        raise Violation("a durable write waits for a flush or write that began after its own end")
    stage.finish(later)
    if fourth in stage.in_flight or third in stage.in_flight:
        raise Violation("durable writes wait for nothing")
    stage.settle()


def failed_durable_write_is_a_failed_flush() -> None:
    """R27: a durable write fails. What failed may be the device's cache, or another write's page; the next flush would succeed."""
    stage = Stage()
    _, _, one, other = _two_durable_writes(stage)
    stage.finish(other)
    stage.effect(one)
    one.result = -errno.ENOSPC
    stage.finish(one)
    flush = stage.submit("flush")
    stage.finish_all()
    if flush in stage.in_flight or not stage.engine.failed_errno:
        raise Violation("a flush succeeds, or never ends, after a durable write has failed")


def failed_durable_part_of_a_block_is_a_failed_flush() -> None:
    """R27: the same of a write that has to be read, modified and written."""
    stage = Stage(logical_block_bytes=4096)
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.now("flush")
    stage.player.errors_expected = True
    stage.submit("write", 1, 1, fua=True)
    stage.finish(*stage.pending(lambda op: op.kind == READ))
    (write,) = stage.pending()
    stage.effect(write)
    write.result = -errno.EIO
    stage.finish(write)
    stage.now("flush")
    if not stage.engine.failed_errno:
        raise Violation("a flush succeeds after a durable write of a part of a block has failed")


def failed_flush_beside_the_engine() -> None:
    """R30: somebody else's flush of the same device has failed; a flush of the disk is under way, another is asked for afterwards."""
    stage = Stage()
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.player.errors_expected = True
    stage.submit("flush")
    stage.pending()
    stage.engine.note_failed_flush(errno.EIO)
    stage.finish_all()
    stage.now("flush")
    if stage.engine.failed_errno != errno.EIO:
        raise Violation("a flush succeeds after one beside the engine has failed")


def lost_page_that_somebody_else_was_told_of() -> None:
    """R28: the flush itself ends well, and so does a durable write, but the sampler has heard of a lost page."""
    reader, writer = os.pipe()  # of which the sampler's question is an error
    with tempfile.TemporaryFile() as storage:
        storage.truncate(1 << 16)
        for blocking in (False, True):
            driver = QueueDriver(force_blocking=blocking)
            driver.attach(storage.fileno(), sampler_fd=reader)
            flushed, written = (driver.run([operation])[0][0] for operation in (("flush",), ("write_durable", 0, bytes(4096))))
            driver.close()
            if 0 in (flushed, written):
                raise Violation("a flush or durable write counts though the sampler says that a page is lost")
    os.close(reader)
    os.close(writer)


def durable_write_on_storage_that_may_be_full() -> None:
    """R29: where the storage may run out, a durable write is a plain one and then a flush: its failure takes nobody's report, and stays
    its own; its success is none before the flush."""
    stage = Stage(durable_writes=False)
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.now("flush")
    write = stage.submit("write", 0, 8, fua=True)
    (plain,) = stage.pending()
    if plain.durable:
        raise Violation("a durable write that may meet the end of the storage, and then takes a flush's report")
    stage.finish(plain)
    flush = stage.pending()
    if write not in stage.in_flight or [op.kind for op in flush] != [FLUSH]:
        raise Violation("a durable write was acknowledged without a flush")
    stage.finish_all()
    stage.player.errors_expected = True
    stage.submit("write", 8, 8, fua=True)
    (full,) = stage.pending()
    stage.effect(full)
    full.result = stage.device.fail_with = -errno.ENOSPC
    stage.finish(full)
    if stage.engine.failed_errno:
        raise Violation("a write that found no space counts as a failed flush")
    stage.player.errors_expected = False
    stage.now("write", 8, 8, fua=True)
    stage.now("flush")
    stage.crash()


def copy_beside_what_is_pending() -> None:
    """R22: a copy changes a word that is pending already; the guest writes over what was copied, and the server is killed."""
    stage = Stage(base_bytes=1 << 20, copy_on_read=True)
    stage.now("write", 0, 8)
    stage.now("read", SECTORS_PER_BLOCK, 8)
    before = stage.counts()["allocations"]
    stage.now("write", SECTORS_PER_BLOCK, 8)
    if stage.counts()["allocations"] != before:
        raise RuntimeError("nothing was copied: the scenario no longer fits the engine")
    stage.kill()
    stage.crash()


def copies_that_a_commit_takes_along() -> None:
    """R22: a commit that is under way took a copy's changes along; the guest writes over what was copied, and the server is killed."""
    stage = Stage(base_bytes=1 << 20, copy_on_read=True)
    stage.now("read", 2 * SECTORS_PER_BLOCK, 8)
    stage.engine.commit_soon()
    (flush,) = stage.pending()
    before = stage.counts()["allocations"]
    write = stage.submit("write", 2 * SECTORS_PER_BLOCK, 8)
    stage.finish_all(but=lambda op: op is flush)
    if write in stage.in_flight or flush.kind != FLUSH or stage.counts()["allocations"] != before:
        raise RuntimeError("the scenario no longer fits the engine")
    stage.kill()
    stage.crash()


def more_changes_than_the_log_takes() -> None:
    """R25: while a commit's flush does not end there are more first writes than the log of pending changes has space for."""
    stage = Stage(virtual_size_bytes=8 << 20, short_log=True)
    for number in range(100):
        stage.submit("write", number * SECTORS_PER_BLOCK, 8)
        stage.finish_all(but=lambda op: op.kind == FLUSH)
    if not stage.in_flight:
        raise Violation("the log of pending changes took more than it has space for")
    stage.finish_all()
    stage.settle()
    stage.kill()
    stage.crash()


FAULTS_ONCE_FOUND = (
    flush_beside_one_that_fails,
    journal_write_beside_a_durable_write,
    write_over_zeros_beside_another_write,
    write_into_a_chunk_being_trimmed,
    close_reaches_a_full_storage,
    slot_being_discarded_is_not_a_full_storage,
    trim_behind_a_stream_of_small_writes,
    durable_write_under_way_at_a_failed_flush,
)


def zeroing_that_lands_late() -> None:
    """R18: what is written into a new chunk while the device still zeroes it would be zeros afterwards."""
    stage = Stage(zero_chunks=True)
    stage.submit("write", 8, 8)
    stage.finish(*stage.pending(lambda op: op.kind == WRITE))
    stage.finish_all()
    stage.now("read", 0, SECTORS_PER_BLOCK)


def first_write_after_a_trim() -> None:
    """R18: a block that was trimmed still holds its data in a slot that was zeroed."""
    stage = Stage(zero_chunks=True)
    stage.now("write", 8, 8)
    stage.now("write", SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    stage.now("trim", SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    stage.now("write", SECTORS_PER_BLOCK + 64, 8)
    stage.now("read", SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)


def first_write_after_a_failed_one() -> None:
    """R18: what a failed write left in an absent block, which reads as zeros since, must not come back."""
    stage = Stage(zero_chunks=True)
    stage.now("write", 8, 8)
    stage.player.errors_expected = True
    stage.submit("write", SECTORS_PER_BLOCK, 8)
    (failed,) = stage.pending()
    stage.effect(failed)
    failed.result = -errno.EIO
    stage.finish(failed)
    stage.now("read", SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    stage.now("write", SECTORS_PER_BLOCK + 64, 8)
    stage.now("read", SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)


def zeroing_that_failed() -> None:
    """R18: a slot whose zeroing failed holds what it held."""
    stage = Stage(zero_chunks=True)
    stage.device.fault = lambda op: -errno.EIO if op.kind == ZERO else 0
    stage.now("write", 8, 8)
    stage.now("read", 0, SECTORS_PER_BLOCK)
    stage.now("write", SECTORS_PER_BLOCK + 8, 8)
    stage.now("read", SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)


def copies_leave_the_guest_its_reserve() -> None:
    """R33: prefetching and copy-on-read on a storage that cannot grow, and whose wake-up mark has been moved away; then the guest writes
    to new chunks."""
    for on_read in (False, True):
        stage = Stage(base_bytes=1 << 20, storage_chunks=3, low_water_chunks=4, on_full="error")
        engine = stage.engine
        stage.set_exhausted(True)
        engine.wake_below_bytes = 0
        if on_read:
            engine.copy_on_read = True
            for chunk in range(4):
                stage.now("read", chunk * SECTORS_PER_CHUNK, 8)
        else:
            engine.prefetch_idle_ns, engine.prefetch_depth = 0, 8
            engine.prefetch_plan([(0, 1 << 20)])
            stage.finish_all()
        if engine.used_slots_count == 0:
            raise RuntimeError("nothing is copied: the scenario no longer fits the engine")
        if engine.free_slots * stage.geometry.chunk_size_bytes < engine.guest_reserve_bytes:
            raise Violation(f"copies have left {engine.free_slots} slots of the guest's reserve")
        for chunk in (2, 3):
            stage.now("write", chunk * SECTORS_PER_CHUNK, 8)


def a_trimmed_disk(**changes: Any) -> Stage:
    """32 chunks, every second of which is trimmed for good; discards are in flight and wait."""
    stage = Stage(virtual_size_bytes=32 << 18, discard=True, **changes)
    for chunk in range(32):
        stage.now("write", chunk * SECTORS_PER_CHUNK, 8)
    stage.now("flush")
    for chunk in range(0, 32, 2):
        stage.submit("trim", chunk * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
    stage.submit("flush")
    stage.finish_all(but=lambda op: op.kind == DISCARD)
    return stage


def many_discards() -> None:
    """R31: sixteen slots that are no neighbours are freed by one flush."""
    stage = a_trimmed_disk()
    for _ in range(16):
        if len(stage.pending(lambda op: op.kind == DISCARD)) > 8:
            raise Violation(f"{len(stage.pending())} discards in flight after a flush")
        stage.finish(*stage.pending()[:1])
    stage.settle()


def slots_wanted_before_their_discard() -> None:
    """R32: all slots are in use or freed, and the guest writes again before most of what was freed has been discarded."""
    stage = a_trimmed_disk(discards_max=1)
    for chunk in range(2, 32, 2):
        stage.submit("write", chunk * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
    stage.finish_all(but=lambda op: op.kind == DISCARD)
    stage.finish_all()
    for sector in range(SECTORS_PER_CHUNK, 32 * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK):
        stage.now("read", sector, SECTORS_PER_CHUNK)
    stage.settle()


def discards_beside_what_is_in_use() -> None:
    """R32: every second slot is discarded, the others hold data."""
    stage = a_trimmed_disk()
    stage.finish_all()
    for chunk in range(1, 32, 2):
        stage.now("read", chunk * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
    stage.settle()


def a_request_longer_than_its_window() -> None:
    """R34: zeros for the whole disk, and then everything ends."""
    stage = Stage(request_window=2)
    stage.submit("zero", 0, 4 * SECTORS_PER_CHUNK, no_hole=True)
    while pending := stage.pending():
        if len(pending) > 2:
            raise Violation(f"{len(pending)} operations of one request at sector 0 are in flight")
        stage.finish(pending[-1])
    if stage.in_flight:
        raise Violation("a write of zeros to each sector never ends")
    stage.settle()


DIRECTED = {
    Bug.CHECKPOINT_OF_PENDING_VALUES: checkpoint_during_pending_change,
    Bug.SLOT_FREED_BESIDE_ITS_TRANSFERS: slot_reuse_under_a_read,
    Bug.FAILURES_IGNORED: failed_flush_is_remembered,
    Bug.STARVED_WRITE_NOT_TRIED: write_without_space_below_the_storage,
    Bug.TRIM_BESIDE_WRITES: trim_under_a_write,
    Bug.JOURNAL_OVER_ITS_TAIL: ring_full_behind_a_slow_checkpoint,
    Bug.ENTRY_LAZY_UNDER_A_WRITE: guest_write_beside_a_copy_in_a_pending_word,
    Bug.NARROW_WRITE_BEFORE_ZEROING: zeroing_that_lands_late,
    Bug.ZEROED_AFTER_A_TRIM: first_write_after_a_trim,
    Bug.ZEROED_AFTER_A_FAILED_WRITE: first_write_after_a_failed_one,
    Bug.FAILED_ZEROING_BELIEVED: zeroing_that_failed,
    Bug.DISCARDS_WITHOUT_BOUND: many_discards,
    Bug.SLOT_FREED_BEFORE_ITS_DISCARD: slots_wanted_before_their_discard,
    Bug.DISCARD_ACROSS_USED_SLOTS: discards_beside_what_is_in_use,
    Bug.DISCARD_OF_A_TAKEN_SLOT: slots_wanted_before_their_discard,
    Bug.COPIES_TAKE_THE_RESERVE: copies_leave_the_guest_its_reserve,
    Bug.PAUSED_REQUEST_FORGOTTEN: a_request_longer_than_its_window,
    Bug.DURABLE_END_WITHOUT_BARRIER: durable_write_beside_one_that_fails,
    Bug.FAILED_DURABLE_WRITE_FORGIVEN: failed_durable_write_is_a_failed_flush,
    Bug.FAILED_DURABLE_JOB_FORGIVEN: failed_durable_part_of_a_block_is_a_failed_flush,
    Bug.BARRIER_ONE_TOO_EARLY: three_durable_writes_in_the_order_of_their_ends,
    Bug.FAILURE_BESIDE_US_IGNORED: failed_flush_beside_the_engine,
    Bug.SAMPLER_NOT_ASKED: lost_page_that_somebody_else_was_told_of,
    Bug.FUA_WITHOUT_FLUSH: durable_write_on_storage_that_may_be_full,
    Bug.COPY_NOT_LOGGED: copy_beside_what_is_pending,
    Bug.PROMOTED_NOT_LOGGED: copies_that_a_commit_takes_along,
    Bug.FULL_LOG_IGNORED: more_changes_than_the_log_takes,
    Bug.RESERVE_FORGOTTEN_WHEN_FULL: copies_leave_the_guest_its_reserve,
    Bug.BASE_RELEASED_BEFORE_COMMIT: base_given_up_before_that_is_durable,
    Bug.ONE_WORD_PROMOTED: guest_write_over_copies_in_two_words,
    Bug.TRIM_SHARES_ITS_CHUNK: write_beside_a_trim_of_the_last_block,
}
