# SPDX-License-Identifier: Apache-2.0
"""The server with clients that speak byte by byte: what it answers, what it bounds, how it starts and ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_client import TIMEOUT_SECONDS, Client, NbdError, go, option, request
from nbd_running import MIB, Disks, Running

from devtools._passthrough import PassThrough
from fvd.errors import Conflict, DeviceError, InUse, InvalidArgument, NotFound, Timeout
from fvd.export import _nbd as nbd
from fvd.export import handshake as hs
from fvd.export._server import TRANSITIONS
from fvd.export.server import Limits, NbdServer, Tcp, Unix

READ, WRITE, FLUSH, TRIM = nbd.COMMAND_READ, nbd.COMMAND_WRITE, nbd.COMMAND_FLUSH, nbd.COMMAND_TRIM
CACHE, ZEROES, STATUS = nbd.COMMAND_CACHE, nbd.COMMAND_WRITE_ZEROES, nbd.COMMAND_BLOCK_STATUS
FUA, NO_HOLE, DF, REQ_ONE = nbd.COMMAND_FLAG_FUA, nbd.COMMAND_FLAG_NO_HOLE, nbd.COMMAND_FLAG_DF, nbd.COMMAND_FLAG_REQ_ONE

Serve = Callable[..., Running]


def pattern(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def answering(path: Path) -> Path:
    """As soon as somebody listens there: the file is there a moment before."""
    eventually(lambda: answers(path))
    return path


# --- Requests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_every_command(serve: Serve, structured: bool) -> None:
    running = serve()
    client = running.client(structured=structured, allocation=structured)
    assert client.size_bytes == 64 * MIB
    for offset, size in ((0, 512), (4096, 4096), (MIB, 100_000), (8 * MIB, 3 * MIB), (64 * MIB - 512, 512), (1001, 77)):
        data = pattern(offset, size)
        assert client.call(WRITE, offset, data=data, flags=FUA if size == 4096 else 0).error == 0
        assert client.call(READ, offset, size, flags=DF if structured else 0).data == data
    assert client.call(FLUSH).error == 0
    assert client.call(ZEROES, 4096, 4096, flags=NO_HOLE | FUA).error == 0
    assert client.call(READ, 4096, 4096).data == bytes(4096)
    assert client.call(TRIM, MIB, MIB).error == 0
    assert client.call(CACHE, 0, 64 * MIB).error == 0
    if structured:
        assert client.call(STATUS, 0, 64 * MIB).extents == [(64 * MIB, 0)]
        assert client.call(STATUS, 512, 1024, flags=REQ_ONE).extents == [(1024, 0)]
    client.send(request(nbd.COMMAND_DISCONNECT))
    assert client.ended()
    counters = running.counters("")
    assert (counters["reads"], counters["writes"], counters["flushes"], counters["errors"]) == (7, 6, 1, 0)
    eventually(lambda: running.counters()["connections"] == 0 and running.counters()["inflight_bytes"] == 0)


def test_refusals_leave_the_connection_usable(serve: Serve) -> None:
    client = serve(minimum_block_bytes=512).client(structured=True)
    assert client.call(READ, 1, 512).error == NbdError.EINVAL
    assert client.call(READ, 64 * MIB, 512).error == NbdError.EINVAL
    assert client.call(WRITE, 64 * MIB, data=bytes(512)).error == NbdError.ENOSPC
    assert client.call(STATUS, 0, 512).error == NbdError.EINVAL
    assert client.call(99, 0, 512).error == NbdError.EINVAL
    assert client.call(READ, 0, 33 * MIB).error == NbdError.EINVAL
    assert client.call(WRITE, 0, data=bytes(33 * MIB)).error == NbdError.EINVAL  # taken in and thrown away
    assert client.call(WRITE, 0, data=pattern(1, 32 * MIB)).error == 0
    assert client.call(READ, 0, 32 * MIB).data == pattern(1, 32 * MIB)


def test_read_only(serve: Serve) -> None:
    client = serve(read_only=True).client()
    assert client.flags & hs.EXPORT_READ_ONLY
    assert [client.call(command, 0, 512).error for command in (TRIM, ZEROES)] == [NbdError.EPERM, NbdError.EPERM]
    assert client.call(WRITE, 0, data=bytes(512)).error == NbdError.EPERM
    assert client.call(READ, 0, 512).data == bytes(512)


def test_requests_byte_by_byte(serve: Serve) -> None:
    client = serve().client()
    stream = request(WRITE, 512, 600, cookie=1, data=pattern(1, 600)) + request(READ, 512, 600, cookie=2) + request(FLUSH, cookie=3)
    client.reads[2] = 512, 600
    for i in range(len(stream)):
        client.send(stream[i : i + 1])
    assert client.take(1).error == 0
    assert client.take(2).data in (pattern(1, 600), bytes(600))  # it need not wait for the write
    assert client.take(3).error == 0


def test_many_requests_at_once(serve: Serve) -> None:
    """Sizes around every buffer's, in both directions, more than one turn takes."""
    client = serve().client(structured=True)
    rng = random.Random(5)
    sizes = [rng.choice([1, 511, 4096, 4097, 32767, 32768, 65536, 65537, 300_000, 600_000]) for _ in range(300)]
    offsets = [sum(sizes[:i]) % (60 * MIB) for i in range(300)]
    image = bytearray(64 * MIB)
    writes = []
    for i, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        image[offset : offset + size] = pattern(i, size)
        writes.append(client.begin(WRITE, offset, data=pattern(i, size)))
        if i % 40 == 39:  # offsets wrap around: never two writes to one place at once
            assert all(client.take(cookie).error == 0 for cookie in writes)
            writes.clear()
    assert all(client.take(cookie).error == 0 for cookie in writes)
    reads = [client.begin(READ, offset, size) for offset, size in zip(offsets, sizes, strict=True)]
    for cookie, offset, size in zip(reads, offsets, sizes, strict=True):
        assert client.take(cookie).data == image[offset : offset + size]


def test_two_connections_at_once(serve: Serve) -> None:
    """A flush on one covers what the other was told is written; both see the same data."""
    running = serve()
    clients = [running.client(), running.client()]
    assert all(client.flags & hs.EXPORT_CAN_MULTI_CONN for client in clients)

    def work(client: Client, number: int) -> None:
        for i in range(200):
            offset = (2 * i + number) * 8192
            assert client.call(WRITE, offset, data=pattern(offset, 8192)).error == 0

    threads = [threading.Thread(target=work, args=pair) for pair in zip(clients, range(2), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    assert clients[0].call(FLUSH).error == 0
    for i in range(400):
        assert clients[i % 2].call(READ, i * 8192, 8192).data == pattern(i * 8192, 8192)


# --- Handshakes ---------------------------------------------------------------------------------------------------------


def test_handshake_byte_by_byte_with_a_request_at_its_heels(serve: Serve) -> None:
    client = serve(name="disk").connect()
    stream = struct.pack(">I", 3) + option(hs.OPT_LIST) + option(hs.OPT_EXPORT_NAME, b"disk") + request(READ, 0, 512, cookie=7)
    for i in range(len(stream)):
        client.send(stream[i : i + 1])
    assert client.receive(18) == hs.Handshake.greeting()
    client.receive(20 + 8 + 20 + 10)
    client.reads[7] = 0, 512
    assert client.take(7).data == bytes(512)


def test_the_default_export(disks: Disks) -> None:
    server = disks.server()
    for number, name in enumerate(("one", "two")):
        server.add_export(name, PassThrough(), storage_fd=disks.file(MIB << number, name), size_bytes=MIB << number)
    running = disks.start(server)
    assert running.client("two").size_bytes == 2 * MIB
    client = running.connect()
    client.greet()
    assert client.option_replies(go(""))[-1][0] == hs.REP_ERR_UNKNOWN
    assert [data[4:7] for _, data in client.option_replies(option(hs.OPT_LIST))] == [b"one", b"two", b""]
    server.close_export("one")
    assert client.option_replies(go(""))[-1][0] == hs.REP_ACK
    with pytest.raises(NotFound):
        server.close_export("one")


def test_handshake_timeout(serve: Serve) -> None:
    running = serve(limits=Limits(handshake_seconds=0.3))
    idle, hesitant, good = running.connect(), running.connect(), running.client()
    hesitant.greet()
    hesitant.send(option(hs.OPT_LIST)[:10])
    began = time.monotonic()
    assert idle.receive(18) and idle.ended() and hesitant.ended()
    assert time.monotonic() - began < 5
    time.sleep(0.3)
    assert good.call(READ, 0, 512).error == 0


def test_a_client_that_floods_us_with_options_does_not_stop_the_others(serve: Serve) -> None:
    running = serve()
    flood, good = running.connect(), running.client()
    flood.greet()
    flood.socket.settimeout(0.2)
    with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
        for _ in range(2000):
            flood.send(option(hs.OPT_LIST) * 100)
    for _ in range(20):
        assert good.call(READ, 0, 4096).error == 0


def test_garbage_is_hung_up_on(serve: Serve) -> None:
    running = serve()
    stranger = running.connect()
    stranger.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    stranger.receive(18)
    assert stranger.ended()
    client = running.client()
    cookie = client.begin(READ, 0, 512)
    client.send(bytes(28))
    assert client.take(cookie).error == 0
    assert client.ended()
    assert running.client().call(READ, 0, 512).error == 0


def test_more_clients_than_allowed(serve: Serve) -> None:
    running = serve(limits=Limits(connections=3))
    clients = [running.client() for _ in range(3)]
    assert running.connect().ended()
    clients[0].socket.close()
    eventually(lambda: running.counters()["connections"] == 2)
    assert running.client().call(READ, 0, 512).error == 0


# --- Slow and vanishing clients -----------------------------------------------------------------------------------------


def test_a_slow_client_is_bounded_and_stops_nobody(serve: Serve) -> None:
    running = serve(limits=Limits(connection_inflight_bytes=4 * MIB))
    slow, good = running.client(structured=True), running.client()
    cookies = slow.begin_reads(500, 65536)  # 32 MB of replies, none taken
    for i in range(100):
        assert good.call(WRITE, 40 * MIB + i * 4096, data=bytes(4096)).error == 0
        assert running.counters()["inflight_bytes"] <= 4 * MIB + 3 * 65536
    assert all(len(slow.take(cookie).data) == 65536 for cookie in cookies)
    eventually(lambda: running.counters()["inflight_bytes"] == 0)


def test_many_slow_clients_do_not_use_up_what_all_share(serve: Serve) -> None:
    running = serve(limits=Limits(connection_inflight_bytes=4 * MIB, total_inflight_bytes=32 * MIB))
    for _ in range(4):
        running.client().begin_reads(200, 65536)
    eventually(lambda: running.counters()["inflight_bytes"] >= 2 * MIB)
    good = running.client()
    for i in range(50):
        assert good.call(WRITE, i * MIB, data=pattern(i, MIB)).error == 0
        assert good.call(READ, i * MIB, MIB).data == pattern(i, MIB)
        assert running.counters()["inflight_bytes"] <= 32 * MIB


def test_clients_that_vanish(serve: Serve) -> None:
    """In every state: handshake, idle, requests under way, in the middle of a write's data, replies not taken."""
    running = serve()
    for i in range(40):
        client = running.connect()
        if i % 8 == 0:
            client.receive(18)
        else:
            client.start()
            for _ in range(i):
                client.begin(READ, 0, 100_000)
            if i % 3 == 0:
                client.send(request(WRITE, 0, 2 * MIB, data=bytes(i * 1000)))
            if i % 5 == 0:
                client.socket.shutdown(socket.SHUT_WR)
        client.socket.close()
    eventually(lambda: running.counters()["connections"] == 0 and running.counters()["inflight_bytes"] == 0)
    counters = running.counters()
    assert counters["handshakes"] == 0 and counters["exports"][""]["open_requests"] == 0
    assert running.client().call(READ, 0, 512).error == 0


def test_half_closed_clients_get_their_replies(serve: Serve) -> None:
    client = serve().client()
    cookies = [client.begin(READ, 0, 65536) for _ in range(20)]
    client.socket.shutdown(socket.SHUT_WR)
    assert all(len(client.take(cookie).data) == 65536 for cookie in cookies)
    assert client.ended()


# --- Start, control, end ------------------------------------------------------------------------------------------------


def test_tcp(serve: Serve) -> None:
    running = serve(name="a b/c", listen=Tcp(port=0))
    assert running.uri("a b/c") == f"nbd://127.0.0.1:{running.address[1]}/a%20b%2Fc"
    client = running.client()
    assert client.call(WRITE, 0, data=pattern(1, 3 * MIB)).error == 0
    assert client.call(READ, 0, 3 * MIB).data == pattern(1, 3 * MIB)
    with pytest.raises(InUse):
        NbdServer(Tcp(port=int(running.address[1]))).start()


def test_call_runs_between_turns(serve: Serve) -> None:
    running = serve()
    assert running.server.call(lambda: 42) == 42
    assert running.server.call(threading.get_ident) != threading.get_ident()
    assert running.server.call(lambda: running.server.call(lambda: 43)) == 43
    with pytest.raises(ZeroDivisionError):
        running.server.call(lambda: 1 // 0)
    with pytest.raises(Timeout):
        running.server.call(lambda: time.sleep(0.5), timeout_seconds=0.05)
    client = running.client()
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.extend(running.server.call(lambda: 1) for _ in range(100))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        assert client.call(READ, 0, 512).error == 0
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    assert len(results) == 400
    running.server.stop(TIMEOUT_SECONDS)
    with pytest.raises(Conflict):
        running.server.call(lambda: 1)


def test_stop_answers_what_is_under_way(serve: Serve) -> None:
    running = serve()
    clients = [running.client() for _ in range(3)]
    cookies = [[client.begin(WRITE, i * 4096, data=pattern(i, 4096)) for i in range(16)] for client in clients]
    eventually(lambda: running.counters("")["writes"] == 48)
    running.server.stop(TIMEOUT_SECONDS)
    for client, pending in zip(clients, cookies, strict=True):
        assert all(client.take(cookie).error == 0 for cookie in pending)
        assert client.ended()
    assert not Path(str(running.address)).exists()


def test_stop_does_not_wait_long_for_a_client_that_takes_no_replies(serve: Serve) -> None:
    running = serve(limits=Limits(drain_seconds=0.3))
    running.client().begin_reads(500, 65536)
    began = time.monotonic()
    running.server.stop(TIMEOUT_SECONDS)
    assert time.monotonic() - began < 5


def test_exports_come_and_go_while_others_are_served(serve: Serve, disks: Disks) -> None:
    running = serve(name="stays")
    stays = running.client("stays")
    for i in range(20):
        running.server.add_export("goes", PassThrough(), storage_fd=disks.file(MIB, f"goes{i}"), size_bytes=MIB)
        with pytest.raises(Conflict):
            running.server.add_export("goes", PassThrough(), storage_fd=disks.file(MIB, f"goes{i}"), size_bytes=MIB)
        client = running.client("goes")
        assert client.call(WRITE, 0, data=pattern(i, 4096)).error == 0
        assert stays.call(WRITE, 0, data=pattern(-i, 4096)).error == 0
        running.server.close_export("goes")
        assert client.ended()
        assert stays.call(READ, 0, 4096).data == pattern(-i, 4096)
    assert list(running.counters()["exports"]) == ["stays"]


def test_bad_exports(disks: Disks) -> None:
    server = disks.server()
    for bad in (
        {"name": "a\0b"},
        {"name": "x" * 5000},
        {"minimum_block_bytes": 3},
        {"minimum_block_bytes": 1 << 17},
        {"block_size_bytes": 256},
        {"block_size_bytes": 5000},
        {"size_bytes": -1},
        {"size_bytes": 1000, "minimum_block_bytes": 512},
    ):
        with pytest.raises(InvalidArgument):
            server.add_export(**{"name": "a", "engine": PassThrough(), "storage_fd": 0, "size_bytes": MIB, **bad})  # type: ignore[arg-type]


def test_a_storage_that_fails_is_an_error_of_the_request(disks: Disks, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(MIB))
    fd = os.open(tmp_path / "short", os.O_RDONLY)
    disks.descriptors.append(fd)
    client = disks.serve(2 * MIB, storage=fd).client(structured=True)
    assert client.call(READ, MIB, 512).error == NbdError.EIO
    assert client.call(WRITE, 0, data=bytes(512)).error == NbdError.EIO
    assert client.call(READ, 0, 512).error == 0


@pytest.mark.parametrize("busy_poll_us", [0, 100])
def test_busy_poll(disks: Disks, busy_poll_us: int) -> None:
    client = disks.serve(busy_poll_us=busy_poll_us).client()
    for i in range(200):
        assert client.call(WRITE, i * 512, data=pattern(i, 512)).error == 0


def test_stop_in_the_main_thread_by_a_signal(disks: Disks, tmp_path: Path) -> None:
    """What the command line does: run() in the main thread, stop() in a handler; the loop does not sit out its sleep."""
    disks.file(MIB)
    script = f"""
import os, signal, sys
from devtools._passthrough import PassThrough
from fvd.export.server import NbdServer, Unix
server = NbdServer(Unix({str(tmp_path / "socket")!r}), on_stop=lambda: (server.close_export("disk"), print("closed")))
fd = os.open({str(tmp_path / "storage")!r}, os.O_RDWR)
server.add_export("disk", PassThrough(), storage_fd=fd, size_bytes=1 << 20)
signal.signal(signal.SIGTERM, lambda *_: server.stop())
server.run()
print("done")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        with Client(str(answering(tmp_path / "socket"))) as client:
            assert client.start().call(WRITE, 0, data=pattern(1, 4096)).error == 0
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=TIMEOUT_SECONDS)[0] == "closed\ndone\n"
            assert client.ended()
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "socket").exists()


def test_a_failing_on_stop_is_raised_by_stop(disks: Disks) -> None:
    def fail() -> None:
        raise DeviceError("it broke")

    server = disks.server(on_stop=fail)
    server.start()
    with pytest.raises(DeviceError):
        server.stop(TIMEOUT_SECONDS)
    server.stop(TIMEOUT_SECONDS)


# --- Unix sockets -------------------------------------------------------------------------------------------------------


def test_socket_mode_and_group(disks: Disks, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    running = disks.serve(listen=Unix(str(path), mode=0o660, group=os.getegid()))
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o660 and status.st_gid == os.getegid()
    running.server.stop(TIMEOUT_SECONDS)
    for bad in (Unix(str(path), group="no such group"), Unix(str(tmp_path / ("x" * 100))), Unix(str(tmp_path / "none" / "socket"))):
        with pytest.raises((InvalidArgument, NotFound)):
            NbdServer(bad).start()


def test_a_dead_process_socket_is_replaced_and_a_live_one_is_not(disks: Disks, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    running = disks.serve(listen=Unix(str(path)))
    assert running.client().call(READ, 0, 512).error == 0
    with pytest.raises(InUse):
        NbdServer(Unix(str(path))).start()
    assert running.client().call(READ, 0, 512).error == 0
    path.unlink()
    path.write_text("mine")
    with pytest.raises(Conflict):
        NbdServer(Unix(str(path))).start()
    running.server.stop(TIMEOUT_SECONDS)
    assert path.read_text() == "mine"  # not ours to remove


def test_the_address_is_free_at_once_after_stop(serve: Serve, disks: Disks) -> None:
    """Rings are torn down asynchronously; a listener must not stay bound meanwhile."""
    port = 0
    for i in range(5):
        server = NbdServer(Tcp(port=port))
        server.add_export("", PassThrough(), storage_fd=disks.file(MIB, f"disk{i}"), size_bytes=MIB)
        running = disks.start(server)
        assert isinstance(running.address, tuple)
        port = running.address[1]
        client = running.client()
        client.call(READ, 0, 512)
        server.stop(TIMEOUT_SECONDS)
        assert client.ended()


def test_a_connection_only_moves_towards_its_end() -> None:
    """The table that the loop uses: from each state but the last, which nothing leaves, a broken socket leads to it at once."""
    after: dict[int, set[int]] = {}
    for (state, event), to in TRANSITIONS.items():
        assert to > state, (state, event, to)
        after.setdefault(state, set()).add(to)
    dead = max(TRANSITIONS.values())
    assert sorted(after) == list(range(dead))
    assert all(dead in states for states in after.values())
