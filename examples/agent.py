#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A small agent of a hypervisor: it makes a disk, serves it, hands it to a QEMU that runs, and adds storage to the volume group when that
gets low. An example, complete and tested; take from it what you need. It knows nothing of fvd but `import fvd`.

    agent.py vg0/vm1 --size 100G --socket /run/fvd/vm1.nbd --qmp /run/vm1.qmp --spare /dev/sdc --spare /dev/sdd

SIGTERM ends it cleanly, and leaves the disk with QEMU, which waits for some time for it to be served again (`reconnect-delay`): an agent
that is replaced by a newer one is a pause for the guest. Started again it finds everything as it was, and goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import fvd
import fvd.aio

log = logging.getLogger("agent")


async def run(arguments: argparse.Namespace) -> int:
    """From provision to the end; returns the exit code."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    # The same disk again is fine; another size would be fvd.Conflict. An interrupted provision is finished here.
    made = await fvd.aio.provision(arguments.volume, arguments.size, grow_step=arguments.grow_step)
    log.info("%s: %s", made.volume, "provisioned" if made.created else "was there")

    # on_full="wait": when storage is exhausted, allocating writes wait for more rather than fail.
    serving = fvd.aio.serve(arguments.volume, socket=arguments.socket, on_full="wait")
    # From the very first event on, then let the guest write: nothing is missed.
    async with serving as served, served.events(history=True) as events:
        watching = asyncio.create_task(watch(events, arguments.spare))
        try:
            if arguments.qmp:
                await attach(arguments.volume, arguments.qmp)
            print("ready", served.uri, flush=True)
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if watching.done():
                await watching  # raises what ended it
                log.error("%s: is not served any longer", arguments.volume)
                return 1
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    log.info("%s: closed", arguments.volume)
    return 0


# --- Events of the disk ------------------------------------------------------------------------------------------------------------


async def watch(events: AsyncIterator[fvd.Event], spares: list[str]) -> None:
    """Follows what happens to the disk; ends when it is not served any longer. Growth itself is fvd's: only the group is ours."""
    extended_at = 0.0
    async for event in events:
        log.info("%s: %s, storage %d bytes, %d free %s", event.volume, event.kind, event.storage_size, event.free_bytes, event.message)
        if event.kind in ("group_low", "group_full") and event.time > extended_at:  # an older one is about the group as it was
            if await extend_group(event.group, spares):
                extended_at = time.time()
        elif event.kind == "storage_error":
            # Nothing more is written until the disk has been opened again: end, and let whoever supervises us start us anew.
            raise fvd.DeviceError(f"{event.volume}: {event.message}")


async def extend_group(group: str, spares: list[str]) -> bool:
    """Gives the next spare device that works to a volume group. Writes that wait for storage then go on by themselves."""
    while spares:
        device = spares.pop(0)
        # No --yes: a device that holds something is refused, never overwritten.
        process = await asyncio.create_subprocess_exec(
            "vgextend", group, device, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output = (await process.communicate())[0].decode(errors="replace")
        if process.returncode == 0:
            log.warning("volume group %s: extended by %s, %d spare devices left", group, device, len(spares))
            return True
        log.error("volume group %s: %s cannot be added: %s", group, device, " ".join(output.split()))
    log.error("%s is running out of space and there is no spare device: an administrator must add some", group or "the file system")
    return False


# --- QEMU ------------------------------------------------------------------------------------------------------------------------


async def attach(volume: str, path: str) -> None:
    """Hands the served disk to the QEMU, or qemu-storage-daemon, that listens for QMP at this socket. One that has it keeps it."""
    found = await asyncio.to_thread(fvd.attach_info, volume)
    node = found.blockdev["node-name"]
    async with Qmp(path) as qmp:
        nodes = await qmp.do({"execute": "query-named-block-nodes", "arguments": {"flat": True}})
        if any(known["node-name"] == node for known in nodes):
            log.info("%s: QEMU has it already, as %s", volume, node)
            return
        known_commands = {command["name"] for command in await qmp.do({"execute": "query-commands"})}
        for command in found.qmp:
            if command["execute"] in known_commands:  # a storage daemon has no devices
                await qmp.do(command)
    log.info("%s: QEMU has it, as %s", volume, node)


class Qmp:
    """A connection to QEMU's monitor: one command after the other, what it tells unasked is passed over."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def __aenter__(self) -> Qmp:
        self._reader, self._writer = await asyncio.open_unix_connection(self._path, limit=1 << 24)
        try:
            await asyncio.wait_for(self._reader.readline(), 10)  # the greeting
        except TimeoutError:
            raise RuntimeError(f"{self._path}: no greeting; a QMP socket has one client at a time, so give us one of our own") from None
        await self.do({"execute": "qmp_capabilities"})
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def do(self, command: dict[str, Any]) -> Any:
        """The command's result. Raises RuntimeError with QEMU's own words."""
        self._writer.write(json.dumps(command).encode() + b"\n")
        await self._writer.drain()
        while line := await self._reader.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"QEMU, {command['execute']}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise RuntimeError(f"QEMU, {command['execute']}: no answer, the connection ended")


# --- The command line ------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", metavar="VOLUME", help="VG/LV, file:PATH or /dev/X")
    parser.add_argument("--size", required=True, help="of the virtual disk, such as 100G")
    parser.add_argument("--grow-step", metavar="SIZE", default="5G", help="storage at first, and more at each growth; default 5G")
    parser.add_argument("--socket", metavar="PATH", required=True, help="where to serve the disk")
    parser.add_argument("--qmp", metavar="SOCKET", help="the QMP socket of the QEMU that gets the disk")
    parser.add_argument("--spare", metavar="DEVICE", action="append", default=[], help="for the volume group when it gets low")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    try:
        return asyncio.run(run(arguments))
    except fvd.FvdError as error:  # every error of fvd: one clear line, one exit code
        log.error("%s", error)
        return error.exit_code
    except (OSError, RuntimeError) as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
