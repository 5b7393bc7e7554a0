# SPDX-License-Identifier: Apache-2.0
"""fvd.lvm: real processes under the runner, reports of any shape, names of devices, and who uses a volume across processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NoSpace, NotFound, PermissionDenied, Unsupported
from fvd.lvm import dm, runner, sharing
from fvd.lvm.commands import Lvm
from fvd.lvm.extents import Piece, parse_pieces
from fvd.lvm.failures import failure as failure_of
from fvd.lvm.report import GroupState, LogicalVolume, PhysicalVolume, VolumeGroup, parse_groups, parse_volumes
from fvd.lvm.runner import Finished, Unfinished, run_command

pytestmark = pytest.mark.pure

VOLUME = LogicalVolume(
    group="vg0",
    name="vm1",
    uuid="uuid-1",
    size_bytes=1 << 30,
    tags=frozenset(),
    layout=frozenset({"linear"}),
    role=frozenset({"public"}),
    active=True,
    active_elsewhere=False,
    open=False,
    suspended=False,
    inactive_table=False,
    writable=True,
    device_number=None,
    health="",
    extent_bytes=4 << 20,
    group_state=GroupState(True, False, False, False),
)

PHYSICAL = PhysicalVolume("/dev/sda", "pv-1", 64 << 20, allocatable=True, missing=False, duplicate=False, number=(8, 0))
GROUP = VolumeGroup("vg0", "uuid-0", 1 << 31, 64 << 20, 4 << 20, frozenset(), GroupState(True, False, False, False), (PHYSICAL,))


def group_row(device: str = "/dev/sda", uuid: str = "pv-1", free: int = 64 << 20, **changes: str) -> dict[str, str]:
    """Of `vgs`, for one physical volume."""
    return {
        "vg_name": "vg0",
        "vg_uuid": "uuid-0",
        "vg_size": str(1 << 31),
        "vg_free": str(free),
        "vg_extent_size": str(4 << 20),
        "vg_tags": "",
        "vg_permissions": "writeable",
        "vg_exported": "",
        "vg_partial": "",
        "vg_clustered": "",
        "vg_shared": "",
        "pv_name": device,
        "pv_uuid": uuid,
        "pv_free": str(free),
        "pv_allocatable": "allocatable",
        "pv_missing": "",
        "pv_duplicate": "",
        "pv_major": "8",
        "pv_minor": "0",
    } | changes


def told(words: Sequence[str], *rows: dict[str, str]) -> Finished:
    """What a command prints that ends well: these rows, if it is a `vgs`."""
    return Finished(tuple(words), 0, json.dumps({"report": [{"vg": list(rows)}] if words[0] == "vgs" else []}), "", 0.0)


# --- The runner ------------------------------------------------------------------------------------------------------------------


def test_output_and_exit_code() -> None:
    done = run_command(["sh", "-c", "echo out; echo err >&2; exit 5"], 10)
    assert (done.exit_code, done.stdout, done.stderr, done.killed, done.crashed) == (5, "out\n", "err\n", False, False)


def test_the_environment_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LD_PRELOAD", "evil.so")
    monkeypatch.setenv("LVM_SYSTEM_DIR", "/somewhere")
    found = dict(line.split("=", 1) for line in run_command(["env"], 10).stdout.splitlines())
    assert found["LC_ALL"] == "C" and found["LVM_SYSTEM_DIR"] == "/somewhere" and "LD_PRELOAD" not in found


def test_nothing_is_a_shells() -> None:
    assert run_command(["echo", "$(reboot)", ";", "`x`"], 10).stdout == "$(reboot) ; `x`\n"


def test_a_full_tmp_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    assert run_command(["echo", "x"], 10).stdout == "x\n"


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(DeviceError, match="cannot be started"):
        run_command(["echo", "x"], 10)
    monkeypatch.setattr(os, "memfd_create", fail)
    with pytest.raises(DeviceError, match="raise the limits"):
        run_command(["echo", "x"], 10)


def test_a_missing_program() -> None:
    with pytest.raises(Unsupported, match="install lvm2"):
        run_command(["fvd-no-such-program"], 1)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_takes_too_long_is_dead_when_we_are_told(stubborn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it ignores SIGTERM, as lvm does while it holds a lock; and so are its children."""
    monkeypatch.setattr(runner, "TERM_SECONDS", 0.2)
    pids = tmp_path / "pids"
    trap = "trap '' TERM;" if stubborn else ""
    begun = time.monotonic()
    with pytest.raises(Unfinished, match=r"sh did not end within 0.3 s and was killed; it said: holding the lock"):
        run_command(["sh", "-c", f"{trap} echo holding the lock >&2; sleep 60 & echo $$ $! > {pids}; wait; wait"], 0.3)
    assert time.monotonic() - begun < 10
    own, child = pids.read_text().split()
    assert not Path(f"/proc/{own}").exists()
    while alive(child):  # killed with it; whoever inherits it reaps it when he likes
        assert time.monotonic() - begun < 20
        time.sleep(0.01)


def test_somebody_elses_kill_is_told_from_a_crash() -> None:
    assert run_command(["sh", "-c", "kill -KILL $$"], 10).killed
    assert run_command(["sh", "-c", "kill -SEGV $$"], 10).crashed
    assert run_command(["sh", "-c", "exit 139"], 10).crashed


def test_ctrl_c_at_the_terminal_does_not_reach_the_command() -> None:
    done = run_command(["sh", "-c", "cut -d' ' -f5 /proc/$$/stat"], 10)
    assert int(done.stdout) != os.getpgrp()


# --- What lvm says ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "error", "hint"),
    [
        ('  Volume group "vg0" has insufficient free space (12 extents): 1280 required.', NoSpace, "vgextend"),
        ("  Insufficient free space: 1280 extents needed, but only 12 available", NoSpace, "vgextend"),
        ("  Insufficient suitable allocatable extents for logical volume vm1: 3 more required", NoSpace, "vgextend"),
        ('  Volume group "vg0" not found\n  Cannot process volume group vg0', NotFound, 'Volume group "vg0" not found'),
        ('  Failed to find logical volume "vg0/vm1"', NotFound, "vm1"),
        ("  Logical volume vg0/vm1 in use.", InUse, "in use"),
        ("  Cannot access VG vg0 with system ID other with unknown local system ID.", InUse, "another host"),
        ('  Logical Volume "vm1" already exists in volume group "vg0"', Conflict, "already exists"),
        ("  Failure to communicate with kernel device-mapper driver.", Unsupported, "no device-mapper"),
        ("  /dev/mapper/control: open failed: Permission denied", Unsupported, "device-mapper"),
        ("  WARNING: Running as a non-root user. Functionality may be unavailable.\n  Permission denied", PermissionDenied, "need root"),
        ("  Skipping clustered volume group vg0", Unsupported, "not supported yet"),
        ("  Cannot access VG vg0 due to failed lock. lvmlockd process is not running.", Unsupported, "not supported yet"),
        (
            "  WARNING: lvmlockd process is not running.\n  Insufficient free space: 2 extents needed, but only 1 available",
            NoSpace,
            "vgextend",
        ),
        (
            "  Extending logical volume vg0/vm1\n/proc/nope: mkdir failed\n  Reloading config files",
            DeviceError,
            "/proc/nope: mkdir failed",
        ),
        ("  Gremlins.", DeviceError, "lvchange failed: Gremlins"),
        ("", DeviceError, "exit status 5"),
    ],
)
def test_failures_become_types(said: str, error: type[FvdError], hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_command", lambda words, timeout: Finished(tuple(words), 5, "", said, 0.0))
    with pytest.raises(error, match=hint.replace("(", r"\(")):
        Lvm().activate(VOLUME)


@pytest.mark.parametrize(
    ("stdout", "stderr", "said"),
    [
        # The cause comes first; what is indented was told on the way.
        ("", "  Reloading config files\nCannot change VG vg0.\nCannot process volume group vg0\n", "Cannot change VG vg0"),
        ("", "WARNING: VG vg0 is missing PV x.\nSee vgreduce.\n", "See vgreduce"),
        ("", "  WARNING: Running as a non-root user.\n  Gremlins.\n", "Gremlins"),
        # In a report's own log, where 2.03.26 and later put it unless they are told otherwise.
        ('{"report": [], "log": [{"log_type": "warn", "log_message": "no"}, {"log_type": "error", "log_message": "yes"}]}', "", "yes"),
        ('{"report": []}', "", "exit status 5"),
        ('{"log": 1}', "", '{"log": 1}'),
        ("  one\n  two\n", "", "two"),
    ],
)
def test_the_line_that_says_why_is_quoted(stdout: str, stderr: str, said: str) -> None:
    assert str(failure_of(Finished(("lvs",), 5, stdout, stderr, 0.0))).startswith(f"lvs failed: {said}")


def test_a_failure_that_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvd.lvm.commands.RETRY_SECONDS", 0.0)
    answers = iter([(5, "  Can't get lock for vg0"), (5, "  device-mapper: remove ioctl failed: Device or resource busy"), (0, "")])
    monkeypatch.setattr(runner, "run_command", lambda words, timeout: Finished(tuple(words), *next((c, "", e) for c, e in answers), 0.0))
    Lvm().activate(VOLUME)
    seen: list[str] = []

    def fail(words: list[str], timeout: float) -> Finished:
        seen.append(words[0])
        return Finished(tuple(words), 5, "", "  Can't get lock for vg0", 0.0)

    monkeypatch.setattr(runner, "run_command", fail)
    with pytest.raises(DeviceError, match="lock"):
        Lvm().activate(VOLUME)
    assert seen == ["lvchange"] * 3 + ["lvs", "vgs"]  # the looks that tell why are not worth a wait


def test_every_command_overrides_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def record(words: list[str], timeout: float) -> Finished:
        seen.append(list(words))
        return told(words, group_row())

    monkeypatch.setattr(runner, "run_command", record)
    lvm = Lvm()
    lvm.volumes("vg0")
    lvm.groups()
    lvm.create("vg0", "vm1", 1 << 30, ["fvd.unfinished"])
    lvm.activate(VOLUME)
    lvm.deactivate(VOLUME)
    lvm.extend("vg0", "vm1", 2 << 30)
    for words in seen:
        config = words[words.index("--config") + 1]
        for setting in (
            "scan_lvs=0",
            'hints="none"',
            "obtain_device_list_from_udev=0",
            'external_device_info_source="none"',
            "ignore_suspended_devices=1",
            "monitoring=0",
            "verify_udev_operations=1",
            "wait_for_locks=1",
            'prefix=""',
            "quoted=1",
            "compact_output=0",
            "report_command_log=0",
            "indent=1",
            "verbose=0",
        ):
            assert setting in config
    create = next(words for words in seen if words[0] == "lvcreate")
    for option in ("--type linear", "--wipesignatures y", "--zero y", "--activate y", "--setautoactivation n", "--addtag fvd.unfinished"):
        assert option in " ".join(create)
    for words in seen[:2]:
        assert words[3:9] == ["--reportformat", "json", "--units", "b", "--nosuffix", "--options"]
    assert "udev_sync=0" in seen[-1][2] and not any("udev_sync" in words[2] for words in seen[:-1])


def test_a_growth_step_is_never_repeated_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have worked, or stopped half-way: that is looked at first."""
    for failure in ((139, ""), (5, "  Can't get lock for vg0")):
        seen: list[str] = []

        def fail(words: list[str], timeout: float, failure: tuple[int, str] = failure) -> Finished:
            seen.append(words[0])  # noqa: B023
            return Finished(tuple(words), failure[0], "", failure[1], 0.0)

        monkeypatch.setattr(runner, "run_command", fail)
        with pytest.raises(DeviceError):
            Lvm().extend("vg0", "vm1", 1 << 30, whole=GROUP)
        assert seen.count("lvextend") == 1 and seen[0] == "lvextend" and len(seen) <= 3


@pytest.mark.parametrize(("interruptions", "seconds"), [(1, 0.5), (2, 30), (3, 30)])
def test_ctrl_c_lets_the_command_end_and_a_second_one_ends_it(
    interruptions: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way it is dead when the interruption is passed on."""
    monkeypatch.setattr(runner, "TERM_SECONDS", 0.2)
    real, left = subprocess.Popen.wait, [KeyboardInterrupt] * interruptions

    def wait(child: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if (tmp_path / "pid").exists() and left:
            raise left.pop()
        return real(child, 0.05 if left else timeout)  # until it has begun, and the interruption comes

    def until_begun(child: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        return wait(child, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until_begun)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_command(["sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/pid; sleep {seconds}; touch {tmp_path}/ended"], 60)
    assert time.monotonic() - begun < 10
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert (tmp_path / "ended").exists() == (interruptions == 1)


def test_a_daemon_that_a_command_leaves_is_not_waited_for() -> None:
    begun = time.monotonic()
    done = run_command(["sh", "-c", "sleep 20 & echo started"], 10)
    assert (done.exit_code, done.stdout) == (0, "started\n") and time.monotonic() - begun < 5


@pytest.mark.parametrize("size", [0, -512, 1000, 513])
def test_sizes_that_lvm_would_refuse(size: int) -> None:
    with pytest.raises(InvalidArgument):
        Lvm().extend("vg0", "vm1", size)


@given(
    st.text()
    | st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(json.dumps)
)
def test_any_answer_is_a_report_or_a_typed_error(answer: str) -> None:
    for parse in (parse_volumes, parse_groups, lambda text: parse_pieces(text, text)):
        try:
            parse(answer)
        except Unsupported:
            continue


@given(
    st.dictionaries(
        st.sampled_from(["vg_name", "lv_name", "lv_size", "lv_tags", "lv_kernel_major", "seg_pe_ranges"]), st.none() | st.text()
    )
)
def test_any_row_is_a_volume_or_a_typed_error(row: dict[str, str | None]) -> None:
    for kind, parse in (("lv", parse_volumes), ("vg", parse_groups)):
        with pytest.raises(Unsupported):
            parse(json.dumps({"report": [{kind: [row]}]}))


def test_pieces_of_volumes() -> None:
    def segment(uuid: str, start: int, size: int, ranges: str, kind: str = "linear") -> dict[str, str]:
        return {
            "lv_uuid": uuid,
            "segtype": kind,
            "seg_start": str(start),
            "seg_size": str(size),
            "seg_pe_ranges": ranges,
            "vg_extent_size": "4",
        }

    segments = [
        segment("a", 40, 8, "/dev/with:colon:5-6"),
        segment("a", 0, 40, "/dev/sda:10-19"),
        segment("gap", 4, 4, "/dev/sda:1-1"),
        segment("striped", 0, 8, "/dev/sda:1-1 /dev/sdb:1-1", "striped"),
        segment("elsewhere", 0, 4, "/dev/sdz:1-1"),
    ]
    physical = [{"pv_name": "/dev/sda", "pe_start": "1000"}, {"pv_name": "/dev/with:colon", "pe_start": "2000"}]
    found = parse_pieces(json.dumps({"report": [{"seg": segments}]}), json.dumps({"report": [{"pv": physical}]}))
    assert found == {"a": [Piece(0, 40, "/dev/sda", 1040), Piece(40, 8, "/dev/with:colon", 2020)]}


# --- Devices ---------------------------------------------------------------------------------------------------------------------

_NAMES = st.from_regex(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,20}", fullmatch=True)


@given(_NAMES, _NAMES)
def test_device_names_are_taken_apart_as_lvm_joins_them(group: str, volume: str) -> None:
    joined = f"{group.replace('-', '--')}-{volume.replace('-', '--')}"
    assert dm.split_name(joined) == [group, volume]
    assert dm.split_name(f"{joined}-real") == [group, volume, "real"]


def test_a_device_that_is_none_of_device_mappers() -> None:
    number = os.makedev(1, 3)
    assert dm.device_name(number) is None and dm.logical_volume_of(number) is None and dm.state(number) is None
    with dm.SuspendGauge(number) as gauge:
        pass
    assert gauge.seconds is None


# --- Who uses a volume -----------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, pathlib
from fvd.lvm import sharing
share = sharing.take("vg0", "vm1", pathlib.Path(sys.argv[1]))
share.arrived()
print("held", flush=True)
sys.stdin.read()
"""


def test_only_the_last_one_out_switches_off(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    mine = sharing.take("vg0", "vm1", tmp_path)
    mine.arrived()
    second = sharing.take("vg0", "vm1", tmp_path)
    second.arrived()
    assert not mine.close_as_last()
    assert not second.close_as_last()
    third = sharing.take("vg0", "vm1", tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert third.close_as_last()  # the dead count for nothing
    third.close()
    third.close()
    other = sharing.take("vg0", "vm2", tmp_path)
    assert other.close_as_last()
    other.close()


def test_who_comes_while_another_arrives_waits(tmp_path: Path) -> None:
    """The first of several finds itself alone, and puts the volume right before the second uses it."""
    mine = sharing.take("vg0", "vm1", tmp_path)
    assert mine.is_alone()
    child = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lock = tmp_path / "vg0:vm1.lock"
    while f":{lock.stat().st_ino} " not in "".join(line for line in Path("/proc/locks").read_text().splitlines(True) if "->" in line):
        time.sleep(0.01)  # until the kernel says that it waits
    assert mine.is_alone()
    mine.arrived()
    assert child.stdout.readline() == "held\n"
    assert not mine.is_alone()
    child.communicate("")
    mine.close()


def test_who_comes_while_it_is_switched_off_waits(tmp_path: Path) -> None:
    mine = sharing.take("vg0", "vm1", tmp_path)
    assert mine.close_as_last()
    child = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lock = tmp_path / "vg0:vm1.lock"
    while f":{lock.stat().st_ino} " not in "".join(line for line in Path("/proc/locks").read_text().splitlines(True) if "->" in line):
        time.sleep(0.01)  # until the kernel says that it waits
    mine.close()
    assert child.stdout.readline() == "held\n"
    child.communicate("")
