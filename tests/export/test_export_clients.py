# SPDX-License-Identifier: Apache-2.0
"""The server with the clients that people use: QEMU's tools, libnbd and its tools, fio."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from nbd_running import MIB, Disks, Running

SIZE = 64 * MIB


def run(*command: str, code: int = 0) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(params=["engine", "passthrough"])
def running(request: pytest.FixtureRequest, disks: Disks) -> Running:
    if request.param == "passthrough":
        return disks.serve(SIZE, name="disk", description="a test's disk")
    engine, storage = disks.engine(SIZE, 64)
    return disks.serve(SIZE, name="disk", description="a test's disk", backend=engine, storage=storage, block_size_bytes=65536)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, holes, and an odd piece at the end of the data."""
    path = tmp_path / "image"
    rng = random.Random(2)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in range(0, 40 * MIB, 8 * MIB):
            file.seek(offset)
            file.write(rng.randbytes(2 * MIB + 777))
    return path


def test_nbdinfo(running: Running) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", running.uri("disk")))["exports"]
    assert export["export-name"] == "disk" and export["export-size"] == SIZE and export["description"] == "a test's disk"
    assert export["contexts"] == ["base:allocation"]
    assert export["block_size_minimum"] == 1 and export["block_size_maximum"] == 32 * MIB
    can = ("can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero")
    assert [export[what] for what in can] == [True] * len(can)
    assert not export["can_fast_zero"] and not export["is_read_only"]
    listed = json.loads(run("nbdinfo", "--json", "--list", running.uri("")))["exports"]
    assert [export["export-name"] for export in listed] == ["disk"]


def test_qemu_img(running: Running, image: Path) -> None:
    uri = running.uri("disk")
    info = json.loads(run("qemu-img", "info", "--output=json", uri))
    assert info["virtual-size"] == SIZE
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", str(image), uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri)
    extents = json.loads(run("qemu-img", "map", "--output=json", uri))
    assert sum(extent["length"] for extent in extents) == SIZE
    if len(running.counters("disk")) and extents[-1]["zero"]:
        assert extents[-1]["length"] >= 16 * MIB
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, f"{image}.back")
    assert Path(f"{image}.back").read_bytes() == image.read_bytes()


def test_qemu_io(running: Running) -> None:
    script = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 1M 64k",
        "aio_write -P 0x33 2M 3M",
        "aio_write -P 0x44 8M 4k",
        "aio_flush",
        "flush",
        "write -z 512k 64k",
        "write -z -u 3M 1M",
        "discard 4M 64k",
        "read -P 0x11 0 512k",
        "read -P 0 512k 64k",
        "read -P 0x22 1M 64k",
        "read -P 0 3M 1M",
        "read -P 0x44 8M 4k",
        "read -P 0x33 2M 1M",
    ]
    commands = [word for line in script for word in ("-c", line)]
    out = run("qemu-io", "-f", "raw", *commands, running.uri("disk"))
    assert "failed" not in out and "Error" not in out
    assert "Pattern verification" not in out


def test_nbdcopy(running: Running, image: Path) -> None:
    uri = running.uri("disk")
    run("nbdcopy", "--flush", "--connections=4", str(image), uri)
    run("nbdcopy", uri, f"{image}.back")
    assert Path(f"{image}.back").read_bytes() == image.read_bytes()
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", uri))
    assert sum(total["size"] for total in totals) == SIZE


def test_fio_verifies_what_it_wrote(running: Running) -> None:
    common = ("--ioengine=nbd", f"--uri={running.uri('disk')}", "--iodepth=32", "--verify=crc32c", "--output-format=json", "--size=32M")
    for options in (("--bs=4k", "--rw=randwrite"), ("--bsrange=512-256k", "--rw=write"), ("--bs=4k", "--rw=randrw", "--fsync=16")):
        out = run("fio", "--name=job", *common, *options)
        assert json.loads(out[out.index("{") :])["jobs"][0]["error"] == 0


def test_libnbd(running: Running) -> None:
    nbd = pytest.importorskip("nbd")
    first, second = nbd.NBD(), nbd.NBD()
    first.add_meta_context("base:allocation")
    for handle in (first, second):
        handle.connect_uri(running.uri("disk"))
    data = random.Random(3).randbytes(5 * MIB)
    first.pwrite(data, 1234)
    second.flush()
    assert second.pread(len(data), 1234) == data
    chunks = []
    buffer = first.pread_structured(len(data), 1234, lambda part, offset, status, error: chunks.append((offset, len(part), status)))
    assert buffer == data and chunks == [(1234, len(data), nbd.READ_DATA)]
    first.zero(MIB, 8 * MIB, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    first.trim(MIB, 16 * MIB)
    first.cache(MIB, 0)
    seen = []
    first.block_status(SIZE, 0, lambda context, offset, entries, error: seen.extend(entries))
    assert sum(seen[::2]) == SIZE
    first.set_strict_mode(0)
    with pytest.raises(nbd.Error, match="Invalid argument"):
        first.pread(4096, SIZE)
    with pytest.raises(nbd.Error, match="No space left"):
        first.pwrite(bytes(4096), SIZE)
    first.shutdown()
    second.shutdown()


def test_libnbd_without_structured_replies(running: Running) -> None:
    nbd = pytest.importorskip("nbd")
    handle = nbd.NBD()
    handle.set_request_structured_replies(False)
    handle.connect_uri(running.uri("disk"))
    assert not handle.can_df()
    handle.pwrite(b"x" * 70000, 5)
    assert handle.pread(70002, 4) == b"\0" + b"x" * 70000 + b"\0"
    handle.shutdown()
