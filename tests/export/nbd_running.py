# SPDX-License-Identifier: Apache-2.0
"""Servers for the tests: over the pass-through backend or a real engine, each on a Unix socket of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nbd_client import TIMEOUT_SECONDS, Client

from devtools._passthrough import PassThrough
from fvd.engine._backend import Backend
from fvd.engine._engine import Engine
from fvd.export.server import Limits, NbdServer, Tcp, Unix
from fvd.format import journal, maps
from fvd.format.geometry import Geometry

MIB = 1 << 20
UUID = bytes(range(16))


class Running:
    """A server in its own thread."""

    def __init__(self, server: NbdServer, address: str | tuple[str, int]) -> None:
        self.server = server
        self.address = address
        self.clients: list[Client] = []

    def connect(self) -> Client:
        client = Client(self.address)
        self.clients.append(client)
        return client

    def client(self, name: str = "", **options: bool) -> Client:
        return self.connect().start(name, **options)

    def uri(self, name: str = "") -> str:
        return self.server.uri(name)

    def counters(self, name: str | None = None) -> dict[str, Any]:
        counters = self.server.counters()
        return counters if name is None else counters["exports"][name]

    def close(self) -> None:
        for client in self.clients:
            client.socket.close()
        self.server.stop(TIMEOUT_SECONDS)


class Disks:
    """Makes files, engines and servers over them, and ends them after the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.descriptors: list[int] = []
        self.running: list[Running] = []

    def file(self, size_bytes: int, name: str = "storage") -> int:
        fd = os.open(self.folder / name, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, size_bytes)
        self.descriptors.append(fd)
        return fd

    def engine(self, virtual_bytes: int, chunks: int, **options: Any) -> tuple[Engine, int]:
        """An empty disk on storage of so many slots of 1 MiB, and the descriptor of its storage."""
        geometry = Geometry(virtual_bytes, 64 << 10, MIB, 16 * MIB, grow_step_bytes=MIB)
        size = geometry.data_offset_bytes + chunks * MIB
        storage = self.file(size, "engine")
        bitmap, table = maps.empty_bitmap(geometry), maps.empty_table(geometry)
        os.pwrite(storage, journal.first_page(geometry, UUID), journal.page_offset_bytes(geometry, 1))
        ring = os.pread(storage, geometry.journal_size_bytes, geometry.journal_offset_bytes)
        state, dirty_bitmap, dirty_table = journal.replay(geometry, UUID, ring, bitmap, table)
        used = maps.check_maps(geometry, bitmap, table, False)
        engine = Engine(
            geometry,
            uuid=UUID,
            bitmap=bitmap,
            table=table,
            used_slots=used,
            journal_state=state,
            dirty_bitmap_pages=dirty_bitmap,
            dirty_table_pages=dirty_table,
            storage_size_bytes=size,
            **options,
        )
        return engine, storage

    def server(self, listen: Unix | Tcp | None = None, **options: Any) -> NbdServer:
        return NbdServer(listen or Unix(str(self.folder / "socket")), **options)

    def start(self, server: NbdServer) -> Running:
        server.start()
        listen = server._listen
        address = listen.path if isinstance(listen, Unix) else next(one.getsockname() for one in server._listeners.values())
        self.running.append(Running(server, address))
        return self.running[-1]

    def serve(
        self, size_bytes: int = 64 * MIB, *, name: str = "", listen: Unix | Tcp | None = None, limits: Limits | None = None,
        force_blocking: bool = False, busy_poll_us: int = 0, backend: Engine | Backend | None = None, storage: int = -1, **export: Any
    ) -> Running:  # fmt: skip
        """A server of one disk: pass-through unless told otherwise."""
        server = self.server(listen, limits=limits, force_blocking=force_blocking, busy_poll_us=busy_poll_us)
        storage = self.file(size_bytes) if storage < 0 else storage
        server.add_export(name, backend or PassThrough(), storage_fd=storage, size_bytes=size_bytes, **export)
        return self.start(server)
