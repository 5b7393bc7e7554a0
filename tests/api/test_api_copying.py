# SPDX-License-Identifier: Apache-2.0
"""Copies from the base as the API tells and steers them: every disk answers, wants reach the right place, the base goes in order."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_copying import BASE_BYTES, DISK_BYTES, MIB, FakeCopying, FakeDisk

import fvd
import fvd.aio
from fvd.api import copying
from fvd.api.events import Event, Hub, Subscription, report
from fvd.api.opened import OpenedVerbs
from fvd.api.serving import ServeOptions, Serving
from fvd.api.types import from_json, info_from_json
from fvd.engine._engine import Want
from fvd.errors import Corrupt, InvalidArgument, NotFound, ReadOnly


@dataclasses.dataclass(frozen=True)
class FakeEvent:
    """What copies from the base report."""

    kind: str
    message: str = ""
    copied_bytes: int = 40 * MIB
    total_bytes: int = DISK_BYTES
    eta_seconds: float | None = 16.0


def verbs_of(disk: FakeDisk, calls: list[int] | None = None) -> OpenedVerbs:
    def call(work: Callable[[], Any]) -> Any:
        if calls is not None:
            calls.append(1)
        return work()

    return OpenedVerbs(disk, call)  # type: ignore[arg-type]


def state_of(disk: FakeDisk) -> fvd.PrefetchStatus:
    return from_json(fvd.PrefetchStatus, verbs_of(disk).prefetch_status())


# --- Every disk answers ------------------------------------------------------------------------------------------------------------


def test_a_status_has_the_keys_of_the_dataclass() -> None:
    assert set(verbs_of(FakeDisk()).prefetch_status()) == {field.name for field in dataclasses.fields(fvd.PrefetchStatus)}


def test_status_of_every_kind_of_disk() -> None:
    assert (state_of(FakeDisk()).state, state_of(FakeDisk()).remaining_bytes) == ("running", 24 * MIB)
    without = state_of(FakeDisk(base=False))
    assert (without.state, without.base_bytes, without.released) == ("off", 0, False)
    released = state_of(FakeDisk(released=True))
    assert (released.state, released.copied_bytes, released.remaining_bytes, released.released) == ("done", DISK_BYTES, 0, True)
    reader = state_of(FakeDisk(read_only=True))
    assert (reader.state, reader.copied_bytes, reader.remaining_bytes) == ("off", 40 * MIB, 24 * MIB)
    assert "read-only" in reader.reason
    assert BASE_BYTES > reader.base_bytes == DISK_BYTES


def test_start_and_stop() -> None:
    disk = FakeDisk()
    calls: list[int] = []
    verbs = verbs_of(disk, calls)
    assert verbs.prefetch_start(2.0, 5 * MIB, "/srv/p")["state"] == "running"
    assert isinstance(disk.copying, FakeCopying)
    [options] = disk.copying.started
    assert (options.delay_s, options.rate_bytes, options.profile) == (2.0, 5 * MIB, "/srv/p")
    assert verbs.prefetch_stop()["state"] == "off"
    assert verbs.copy_on_read(True)["copy_on_read"] is True
    assert verbs.copy_on_read(False)["copy_on_read"] is False
    assert verbs.profile_record("/srv/p") == {"volume": disk.name, "path": "/srv/p", "extents": 3, "bytes": 12288}
    assert len(calls) == 5  # each of them in the loop's thread


def test_a_disk_that_has_everything_stays_as_it_is() -> None:
    by_now = FakeDisk()
    assert isinstance(by_now.copying, FakeCopying)
    by_now.copying.released = True
    for disk in (FakeDisk(released=True), by_now):
        verbs = verbs_of(disk)
        verbs.prefetch_start()
        verbs.prefetch_stop()
        verbs.copy_on_read(True)
        assert verbs.prefetch_status()["released"]
    assert by_now.copying.started == []
    assert verbs_of(by_now).profile_record()["extents"] == 3  # what was read before is remembered
    with pytest.raises(InvalidArgument, match="nothing was read"):
        verbs_of(FakeDisk(released=True)).profile_record()


@pytest.mark.parametrize(
    ("disk", "error"), [(FakeDisk(base=False), InvalidArgument), (FakeDisk(read_only=True), ReadOnly)], ids=("no base", "read-only")
)
def test_what_cannot_copy_says_so(disk: FakeDisk, error: type[Exception]) -> None:
    verbs = verbs_of(disk)
    attempts: list[Callable[[], object]] = [verbs.prefetch_start, lambda: verbs.copy_on_read(True), verbs.profile_record]
    for verb in attempts:
        with pytest.raises(error, match=r"^file:/srv/vm1.img .*; "):
            verb()
    assert verbs.prefetch_stop()["state"] == "off"
    assert verbs.copy_on_read(False)["copy_on_read"] is False


@pytest.mark.parametrize("wrong", [{"delay_s": -1.0}, {"delay_s": math.nan}, {"delay_s": math.inf}, {"rate_bytes": -1}])
def test_options_that_cannot_work(wrong: dict[str, Any]) -> None:
    disk = FakeDisk()
    with pytest.raises(InvalidArgument, match="prefetching cannot"):
        verbs_of(disk).prefetch_start(**wrong)
    with pytest.raises(InvalidArgument, match="prefetching cannot"):
        copying.volume_options(fvd.PrefetchOptions(**wrong))
    assert isinstance(disk.copying, FakeCopying)
    assert disk.copying.started == []


def test_options_for_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert copying.prefetch_options("50M", 1, "p") == fvd.PrefetchOptions(1, 50 * MIB, str(tmp_path / "p"))
    assert [copying.volume_options(said) for said in (None, True, False)] == [None, True, False]
    options = copying.volume_options(fvd.PrefetchOptions(profile="p"))
    assert not isinstance(options, bool) and options is not None
    assert (options.delay_s, options.rate_bytes, options.profile) == (10.0, 0, str(tmp_path / "p"))


# --- info --------------------------------------------------------------------------------------------------------------------------


def test_info_of_an_open_disk() -> None:
    found = copying.info_of_open(FakeDisk())  # type: ignore[arg-type]
    assert (found["copy_on_read"], found["prefetch_default"], found["base_released"]) == (False, True, False)
    assert found["prefetch"]["state"] == "running"
    without = copying.info_of_open(FakeDisk(base=False))  # type: ignore[arg-type]
    assert without == {"copy_on_read": False, "prefetch_default": False, "prefetch": None, "base_released": False}
    assert copying.info_of_open(FakeDisk(released=True))["base_released"]  # type: ignore[arg-type]


def test_info_of_a_closed_disk_that_has_everything(tmp_path: Path) -> None:
    """Everything is what its base reaches, no more: a part of a block counts, what lies behind the base does not."""
    base = tmp_path / "base"
    base.write_bytes(b"b" * (MIB + 512))
    name = f"file:{tmp_path / 'vm1.img'}"
    made = fvd.provision(name, "8M", base=base, grow_step="16M", journal_size="64K")
    assert not made.base_released
    with fvd.open(name, copy_on_read=False) as disk:
        disk.pwrite(0, b"x" * MIB)
        disk.flush()
    assert not fvd.info(name).base_released
    with fvd.open(name, copy_on_read=False) as disk:
        disk.pwrite(MIB, b"x" * 512)
    assert fvd.info(name).base_released
    assert [listed.info.base_released for listed in fvd.list_volumes(str(tmp_path)) if listed.info] == [True]


def test_an_info_from_another_process() -> None:
    there = {field.name: 0 for field in dataclasses.fields(fvd.Info) if field.default is dataclasses.MISSING}
    status = {"volume": "v", **FakeCopying().status(), "of_a_later_version": 1}
    found = info_from_json({**there, "base": {"path": "nbd://x", "size": 1, "format": "nbd"}, "prefetch": status})
    assert isinstance(found.prefetch, fvd.PrefetchStatus)
    assert (found.prefetch.state, found.base) == ("running", fvd.Base("nbd://x", 1, "nbd"))


# --- Events ------------------------------------------------------------------------------------------------------------------------


def all_of(hub: Hub) -> list[Event]:
    return Subscription([hub], history=True, notify=lambda: None).take() or []


def test_events_of_the_base_have_their_fields() -> None:
    hub = Hub("vm")
    hub.attach(FakeDisk())  # type: ignore[arg-type]
    hub.tell(FakeEvent("prefetch_progress", "half"))  # type: ignore[arg-type]
    [event] = all_of(hub)
    assert (event.kind, event.message, event.copied_bytes, event.total_bytes, event.eta_seconds) == (
        *("prefetch_progress", "half"),
        *(40 * MIB, DISK_BYTES, 16.0),
    )
    assert (event.storage_size, event.free_bytes) == (10 * MIB, 7 * MIB)  # as they are now


def test_what_is_told_during_open_comes_after_served() -> None:
    hub, disk = Hub("vm"), FakeDisk()
    hub.tell(FakeEvent("prefetch_started"))  # type: ignore[arg-type]
    assert all_of(hub) == []
    hub.publish("served", disk)  # type: ignore[arg-type]
    hub.attach(disk)  # type: ignore[arg-type]
    hub.attach(disk)  # type: ignore[arg-type]
    assert [(event.number, event.kind) for event in all_of(hub)] == [(1, "served"), (2, "prefetch_started")]


def test_a_lost_base_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fvd.api")
    for kind in ("base_lost", "base_back"):
        report(Event(kind, "vm", 1, 0.0, 0, 0))
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


# --- What a served disk's engine wants -----------------------------------------------------------------------------------------------


class FakeServer:
    """Takes part in the order in which a base is given up."""

    def __init__(self, trace: list[str]) -> None:
        self._trace = trace

    def uri(self, name: str) -> str:
        return f"nbd://{name}"

    def release_base(self, name: str) -> None:
        self._trace.append(f"queue {name}")


def served_over(disk: FakeDisk) -> tuple[Serving, Hub]:
    served = Serving(("file:a",), ServeOptions(socket="unused", read_only=disk.read_only))
    hub = Hub("vm")
    served._server = FakeServer(disk.trace)  # type: ignore[assignment]
    served._disks["a"] = disk  # type: ignore[assignment]
    served._hubs["a"] = hub
    return served, hub


def test_steering_reaches_the_copies_and_is_cleared() -> None:
    disk = FakeDisk()
    served, hub = served_over(disk)
    disk.engine.want = Want.GROWTH | Want.EVENT | Want.STEER
    served._act_on_want("a", Want.STEER)
    assert isinstance(disk.copying, FakeCopying)
    assert disk.copying.wants == [Want.STEER]
    assert disk.engine.want == 1 | 2  # what others act on stays
    assert [event.kind for event in all_of(hub)] == ["served"]  # the first thing that is told, whoever wants first
    assert disk.trace == []


def test_a_reader_is_told_of_its_base() -> None:
    disk = FakeDisk(read_only=True)
    served, hub = served_over(disk)
    for failing in (False, True, True, False):
        disk.engine.base_failing = failing
        disk.engine.want = Want.BASE
        served._act_on_want("a", Want.BASE)
        assert disk.engine.want == 0
    found = all_of(hub)
    assert [event.kind for event in found] == ["served", "base_lost", "base_back"]
    assert "/srv/base.raw" in found[1].message and "30 s" in found[1].message


# --- By the volume's name ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_not_served(tmp_path: Path) -> None:
    name = f"file:{tmp_path / 'vm1.img'}"
    asks: list[Callable[[], object]] = [
        lambda: fvd.prefetch_start(name),
        lambda: fvd.prefetch_stop(name),
        lambda: fvd.prefetch_status(name),
        lambda: fvd.set_copy_on_read(name, True),
        lambda: fvd.record_profile(name),
    ]
    for ask in asks:
        with pytest.raises(NotFound, match=r"check the name|does not exist"):
            ask()
    fvd.provision(name, "64M")
    for ask in asks:
        with pytest.raises(NotFound, match=r"is not served; run fvd-lv serve .*systemctl start fvd@vm1.img"):
            ask()


def test_verbs_through_the_control_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the function to the open disk and back, with a copying that only remembers."""
    monkeypatch.chdir(tmp_path)
    name = f"file:{tmp_path / 'vm1.img'}"
    base = tmp_path / "base"
    base.write_bytes(b"b" * MIB)
    fvd.provision(name, "64M", base=base)
    with fvd.serve(name, socket=tmp_path / "vm.sock", prefetch=False) as served:
        [disk] = served._serving._disks.values()
        fake = FakeCopying()
        real, disk.copying = disk.copying, fake  # type: ignore[assignment]
        try:
            assert fvd.prefetch_status(name) == served.prefetch_status() == served.prefetch_status(name)
            started = fvd.prefetch_start(name, rate="50M", delay_s=2, profile="p")
            assert (started.volume, started.state) == (name, "running")
            assert fake.started[-1].profile == str(tmp_path / "p")
            assert (fake.started[-1].rate_bytes, fake.started[-1].delay_s) == (50 * MIB, 2)
            assert fvd.set_copy_on_read(name, True).copy_on_read
            assert fvd.info(name).copy_on_read and not served.set_copy_on_read(False).copy_on_read
            assert fvd.prefetch_stop(name).state == "off"
            assert fvd.record_profile(name, "p") == fvd.SavedProfile(name, str(tmp_path / "p"), 3, 12288)
            assert served.record_profile().path == "/srv/base.fvd-profile"
            with pytest.raises(InvalidArgument, match="prefetching cannot"):
                fvd.prefetch_start(name, delay_s=-1)
        finally:
            disk.copying = real


# --- Profiles ------------------------------------------------------------------------------------------------------------------------


def test_read_profile(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text(json.dumps({"fvd_profile": 1, "base_size_bytes": MIB}) + "\n[4096, 512]\n[0, 1024]\n")
    assert fvd.read_profile(path) == fvd.Profile(str(path), MIB, 1536, [(4096, 512), (0, 1024)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]\n",
        "{}\n",
        "\0\n",
        '{"fvd_profile": 1, "base_size_bytes": 0}\n',
        '{"fvd_profile": 1, "base_size_bytes": true}\n',
        '{"fvd_profile": 1, "base_size_bytes": 4096}\n[0]\n',
        '{"fvd_profile": 1, "base_size_bytes": 4096}\n[0, 0]\n',
        '{"fvd_profile": 1, "base_size_bytes": 4096}\n[-1, 5]\n',
        '{"fvd_profile": 1, "base_size_bytes": 4096}\n[4000, 97]\n',
        '{"fvd_profile": 1, "base_size_bytes": 4096}\n[1.5, 1]\n',
        '{"fvd_profile": 1, "base_size_bytes": 4096}\n[0, 512',
        "[" * 100_000,
    ],
)
def test_what_is_no_profile(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p"
    path.write_text(text)
    with pytest.raises(Corrupt, match=f"^{path}"):
        fvd.read_profile(path)


def test_a_profile_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound):
        fvd.read_profile(tmp_path / "absent")
    with pytest.raises(fvd.Unsupported, match="is a directory"):
        fvd.read_profile(tmp_path)
    monkeypatch.setattr("fvd.base.profile.BYTES_MAX", 10)
    (tmp_path / "p").write_bytes(bytes(11))
    with pytest.raises(Corrupt, match="is the most"):
        fvd.read_profile(tmp_path / "p")


def test_open_disks_have_them_as_methods_awaited_too(tmp_path: Path) -> None:
    name = f"file:{tmp_path / 'vm1.img'}"
    fvd.provision(name, "64M")
    with fvd.open(name) as disk:
        assert (disk.prefetch_status().state, disk.prefetch_stop().released) == ("off", False)
        assert not disk.set_copy_on_read(False).copy_on_read
        for refused in (disk.prefetch_start, disk.record_profile):
            with pytest.raises(InvalidArgument, match="has no base"):
                refused()

    async def use(disk: fvd.aio.AsyncDisk | fvd.aio.AsyncServed) -> None:
        assert (await disk.prefetch_status()).state == (await disk.prefetch_stop()).state == "off"
        assert not (await disk.set_copy_on_read(False)).copy_on_read
        for refused in (disk.prefetch_start(rate="1M"), disk.record_profile(tmp_path / "p")):
            with pytest.raises(InvalidArgument, match="has no base"):
                await refused

    async def work() -> None:
        async with fvd.aio.open(name) as disk:
            await use(disk)
        async with fvd.aio.serve(name, socket=tmp_path / "vm.sock") as served:
            await use(served)
            assert (await fvd.aio.prefetch_status(name)).volume == name

    asyncio.run(work())
