# SPDX-License-Identifier: Apache-2.0
"""The main job on a logical volume of a group that the user names, with what is particular to LVM; and the same in a guest.

It makes one logical volume with a name of its own, and removes it at the end, however that comes. Only with a spare device it does more: it
fills the group (a second logical volume, which takes what is free), adds the device to it, and takes both back.

What is written is 64 KiB in each MiB: storage is taken by the MiB, so it grows as under a full load, and a sixteenth of it is written.
Against that the load is held to a rate at which a growth step fills up in 13 seconds, 400 MiB of storage a second for one of 5 GiB.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from demo_parts import (
    CHUNK,
    FLUSH_EVERY_PIECES,
    FVD_LV,
    GIB,
    IN_FLIGHT,
    KIB,
    MIB,
    ROOT,
    TIMES,
    Client,
    answer,
    end_servers,
    export_and_check,
    file_places,
    guest_writes,
    holds,
    info,
    kill_in_mid_load,
    make_base,
    run,
    say,
    sha256,
    show_times,
    shown,
    size,
    start_server,
    stop_server,
    timed,
    title,
    verify_after_crash,
)

LOG = Path("serve.log")
SOCKET = Path("vm1.sock")
PIECE = 64 * KIB
FILE_SYSTEM_SIZE = 256 * MIB
LARGEST_STEP, SMALLEST_STEP = 5 * GIB, 640 * MIB
SECONDS_FOR_A_STEP = 12.8
# The first storage, one step under the load, a quarter of one by hand, and space for a second step that a slow machine may ask for.
STEPS_NEEDED = 3.25
SPARE_MIN = 1 * GIB
BEYOND_FULL = 256  # chunks: what waits in a full group
WAIT_SECONDS = 60

# The guest of `make demo-lvm`: sparse files of the host.
GROUP_SIZE, SPARE_SIZE = "40G", "8G"
WRITTEN_BYTES = 2 * GIB
GUEST_SECONDS = 900
# The demo's own files are in the guest's memory, gone with it however it ends.
GUEST = 'export TMPDIR=/dev/shm; echo "$ vgcreate vg0 /dev/ubda"; vgcreate vg0 /dev/ubda && exec "$@" vg0 --spare /dev/ubdb'


# --- Before it begins ------------------------------------------------------------------------------------------------------------


def refuse(reason: str) -> None:
    sys.exit(f"demo: {reason}")


def check_group(group: str, spare: str | None) -> int:
    """The growth step for which the group has space. Ends with a word on what is missing; changes nothing."""
    if os.geteuid() != 0:
        what = f"VG={group}" + (f" SPARE={spare}" if spare else "")
        refuse(f"a logical volume needs root. Type: sudo make demo {what}\nWithout root: make demo (a file), make demo-lvm (a guest)")
    if shutil.which("lvs") is None:
        refuse("lvm2 is not installed: apt-get install lvm2")
    if not re.fullmatch(r"[a-zA-Z0-9+_.][a-zA-Z0-9+_.-]*", group):
        refuse(f"{group!r} is not the name of a volume group: VG=vg0")
    groups = {row["vg_name"]: row for row in rows("vgs", "vg_name,vg_free")}
    if group not in groups:
        refuse(f"there is no volume group {group}. " + (f"There are: {', '.join(groups)}" if groups else "There is none; see vgcreate(8)"))
    free = int(groups[group]["vg_free"])
    step = LARGEST_STEP
    while step > SMALLEST_STEP and free < STEPS_NEEDED * step:
        step //= 2
    if free < STEPS_NEEDED * step:
        refuse(f"volume group {group} has {size(free)} free; the demo needs {size(STEPS_NEEDED * SMALLEST_STEP)}, and gives all of it back")
    if spare is not None:
        check_spare(group, spare)
    if step < LARGEST_STEP:
        say(f"Only {size(free)} are free in {group}, so the growth step is {size(step)} here instead of {size(LARGEST_STEP)}.")
    return step


def check_spare(group: str, spare: str) -> None:
    """An empty block device that nobody uses; and no other disk of fvd in the group, which would wait in a full group too."""
    if not Path(spare).is_block_device():
        refuse(f"SPARE={spare} is not a block device")
    probed = subprocess.run(["blkid", "--probe", spare], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if probed.returncode != 2 or probed.stdout:
        refuse(f"SPARE={spare} is not empty, so it is not touched. blkid --probe says: {(probed.stdout or probed.stderr).strip()}")
    try:
        descriptor = os.open(spare, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        length = os.lseek(descriptor, 0, os.SEEK_END)
        os.close(descriptor)
    except OSError as error:
        refuse(f"SPARE={spare}: {error.strerror}")
    if length < SPARE_MIN:
        refuse(f"SPARE={spare} has {size(length)}; the demo needs {size(SPARE_MIN)}")
    others = [f"{group}/{row['lv_name']}" for row in rows("lvs", "lv_name", "--select", "lv_tags=fvd.disk", group)]
    if others:
        refuse(f"SPARE means that {group} is full for a while: {', '.join(others)} could not grow. Leave it out, or name another group")


def rows(command: str, fields: str, *more: str) -> list[dict[str, str]]:
    """What lvs or vgs report, sizes in bytes."""
    report = answer(command, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields, *more)["report"]
    reported: list[dict[str, str]] = report[0][command.removesuffix("s")]
    return reported


def is_device(path: str, number: int) -> bool:
    """False also for a physical volume that is missing."""
    return Path(path).is_block_device() and Path(path).stat().st_rdev == number


# --- What the demo makes, and takes back ------------------------------------------------------------------------------------------


class Made:
    """Names that nobody else has, and what of them is there."""

    def __init__(self, group: str, spare: str | None) -> None:
        self.group = group
        self.name = f"fvd-demo-{secrets.token_hex(4)}"
        self.rest = f"{self.name}-rest"
        self.spare = spare
        self.spare_was_used = False
        self.listener: subprocess.Popen[bytes] | None = None
        if self.names():
            refuse(f"{group}/{self.name} is there already")  # not in this world's lifetime

    @property
    def volume(self) -> str:
        return f"{self.group}/{self.name}"

    def names(self) -> list[str]:
        """Those of ours that are in the group."""
        return [row["lv_name"] for row in rows("lvs", "lv_name", self.group) if row["lv_name"] in (self.name, self.rest)]

    @property
    def device(self) -> Path:
        return Path("/dev") / self.volume

    def row(self) -> dict[str, str]:
        return rows("lvs", "lv_size,lv_active,lv_tags", self.volume)[0]

    def free(self) -> int:
        return int(rows("vgs", "vg_free", self.group)[0]["vg_free"])

    def show(self) -> dict[str, str]:
        """lvs as people see it, and as programs do."""
        run("lvs", "-o", "lv_name,lv_size,lv_active,lv_tags", self.volume)
        return self.row()

    def take_back(self) -> None:
        """What is left of it; all is gone already when the story has ended well. Another signal does not stop this."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        try:
            print(end="", flush=True)
        except OSError:
            sys.stdout = Path(os.devnull).open("w")  # nobody reads any more  # noqa: SIM115
        end_servers()
        if self.listener is not None:
            self.listener.terminate()
            self.listener.wait()
        left = self.names()
        if left or self.spare_was_used:
            print("\nTaking back what the demo has made:", flush=True)
        try:
            if self.name in left:
                run("fvd-lv", "remove", self.volume)
            self.give_back_group()
        except SystemExit:
            left = [f"{self.group}/{name}" for name in self.names()] + ([f"{self.spare}"] if self.spare_was_used else [])
            print(f"\nNot taken back: {', '.join(left)}; see lvremove(8), vgreduce(8), pvremove(8)", flush=True)
            raise

    def give_back_group(self) -> None:
        """The volume that takes up space, and the spare device; in this order, for the volume may be on it."""
        if self.rest in self.names():
            run("lvremove", "--yes", f"{self.group}/{self.rest}")
        if self.spare is not None and self.spare_was_used:
            # An interrupted vgextend may have got half-way. The device was empty: what is on it is from here.
            number = Path(self.spare).stat().st_rdev
            groups = [row["vg_name"] for row in rows("pvs", "pv_name,vg_name") if is_device(row["pv_name"], number)]
            if groups == [self.group]:
                run("vgreduce", self.group, self.spare)
            if groups in ([self.group], [""]):
                run("pvremove", self.spare)
            self.spare_was_used = False


class Events:
    """`fvd-lv events VOLUME` beside everything: what it has said so far."""

    FILE = Path("events.jsonl")

    def __init__(self, made: Made) -> None:
        command = [*FVD_LV, "events", made.volume]
        print(f"$ {shown(command)} > {self.FILE} &", flush=True)
        with self.FILE.open("wb") as file:
            made.listener = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL)

    def wait(self, kind: str, number: int = 1) -> dict[str, Any]:
        """The event of this kind, the number-th since the beginning."""
        deadline = time.monotonic() + WAIT_SECONDS
        while len(events := self.all(kind)) < number:
            if time.monotonic() > deadline:
                run("cat", str(self.FILE), str(LOG))
                holds(False, f"fvd-lv events told of {kind}")
            time.sleep(0.1)
        return events[number - 1]

    def all(self, kind: str) -> list[dict[str, Any]]:
        lines = self.FILE.read_text().rpartition("\n")[0].splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def show(self, pattern: str) -> None:
        run("grep", "-E", f'"kind": "({pattern})"', str(self.FILE))


# --- The story -------------------------------------------------------------------------------------------------------------------


def on_group(group: str, spare: str | None) -> None:
    print(f"fvd: a 100 GB disk in 5 GB of volume group {group}, through a crash", flush=True)
    step = check_group(group, spare)
    made = Made(group, spare)
    say(f"It makes the logical volume {made.volume}, touches no other, and removes it at the end.")
    if spare:
        say(f"For a while {group} will be full, and {spare} a part of it; both end.")
    if in_uml():
        say("This is a User-Mode Linux guest: device-mapper, udev and lvm2 are real, but it has one CPU and is slow at starting processes.")
        say("Its times say nothing about how fast fvd is.")
    folder = Path(tempfile.mkdtemp(prefix="fvd-demo-"))
    os.chdir(folder)  # so that names are short
    try:
        story(made, step, folder)
    finally:
        try:
            made.take_back()
        finally:
            os.chdir("/")
            shutil.rmtree(folder, ignore_errors=True)


def story(made: Made, step: int, folder: Path) -> None:
    volume, free_at_first = made.volume, made.free()

    title("1. A base image with a real file system")
    base, guest = make_base(folder, FILE_SYSTEM_SIZE)
    base_sum = sha256(base)

    first_bytes = make_disk(made, step, base)
    events, server, uri = serve(made)
    guest_writes(uri, base, guest)
    load, grown = write_past_a_step(made, step, events, uri, first_bytes)
    show_promises(made, int(made.row()["lv_size"]))
    add_storage_by_hand(volume, step, events, grown["storage_size"])

    title("7. kill -9 in the middle of the next load")
    kill_in_mid_load(load, server, min(600, step // 8 // CHUNK))
    events.wait("server_gone")
    events.show("server_gone")
    holds(made.show()["lv_active"] == "active", "its volume is active still: nobody could take it down")
    run("fvd-lv", "check", volume)
    holds(info(volume)["clean"] is False, "info says that the disk was not closed cleanly")

    title("8. Opened again: everything that was acknowledged is there")
    server, uri = start_server(volume, SOCKET, LOG)
    verify_after_crash(load, uri, show_rate=False)

    title("9. The guest's file system, exported and checked")
    export_and_check(SOCKET, guest, show_rate=False)
    holds(sha256(base) == base_sum, f"the base is untouched (sha256 {base_sum[:16]}…)")

    title("10. A full group")
    if made.spare:
        full_group(made, step, events, uri, load.places)
    else:
        say(f"Left out: it would fill {made.group} and needs an empty device to add to it: make demo VG={made.group} SPARE=/dev/sdX")

    title("11. Where the chunks lie")
    run("fvd-lv", "map", volume, "--picture", "always")

    close_and_remove(made, server, free_at_first)
    show_times("Times of this run" + (", in a slow guest: no measure of fvd" if in_uml() else ""))


def make_disk(made: Made, step: int, base: Path) -> int:
    """Returns the size of its logical volume."""
    title("2. A 100 GB disk over it, in a logical volume")
    provision = ("fvd-lv", "provision", made.volume, "--size", "100G", "--base", str(base))
    with timed("provision"):
        run(*provision, *(() if step == LARGEST_STEP else ("--grow-step", str(step))))
    lv = made.show()
    holds(step <= int(lv["lv_size"]) < 2 * step, f"the disk of 100 GiB is a logical volume of {size(int(lv['lv_size']))}")
    holds("fvd.disk" in lv["lv_tags"].split(","), "its tags say that it is a disk of fvd, and how large it can become")
    holds(lv["lv_active"] == "" and not made.device.exists(), f"and it is inactive: nobody has it open, there is no {made.device}")
    return int(lv["lv_size"])


def serve(made: Made) -> tuple[Events, subprocess.Popen[str], str]:
    """With a listener, refused a second time, and as QEMU sees it."""
    volume = made.volume
    title("3. Served over NBD")
    events = Events(made)
    server, uri = start_server(volume, SOCKET, LOG)
    holds(made.show()["lv_active"] == "active" and made.device.is_block_device(), "while it is served it is active")
    run("fvd-lv", "serve", volume, "--socket", "other.sock", expect=5)
    say("(A second server on the same disk: refused.)")
    run("fvd-lv", "attach-info", volume, "--format", "qemu")
    attach = answer("fvd-lv", "attach-info", volume, "--output", "json")
    seen = run("qemu-img", "info", f"json:{json.dumps(attach['blockdev'])}")
    holds("virtual size: 100 GiB" in seen, "QEMU opens what attach-info says, and sees 100 GiB")
    return events, server, uri


def write_past_a_step(made: Made, step: int, events: Events, uri: str, first_bytes: int) -> tuple[Client, dict[str, Any]]:
    """Returns what wrote it, and what `info` said then."""
    title("4. A load that goes past the first growth step")
    rate = step / SECONDS_FOR_A_STEP / CHUNK
    load = Client(uri, file_places(step), PIECE, rate)
    pieces = (step + step // 10) // CHUNK
    say(f"{pieces} pieces of 64 KiB as files all over the disk, {rate:.0f} a second, a flush every {FLUSH_EVERY_PIECES};")
    say(f"each in a MiB of its own, so that {size(pieces * CHUNK)} of storage are taken, but only {size(pieces * PIECE)} written")
    load.write(pieces)
    done = events.wait("extend_done")
    grown = info(made.volume)
    holds(grown["statistics"]["waited_for_space"] == 0, "no write waited for storage")
    events.show("low_water|extend_.*")
    seconds, suspended = done["seconds"], done["suspend_seconds"]
    holds(seconds > 0 and suspended is not None and suspended < seconds, "fvd-lv events told of the step, as it happened")
    TIMES.append(("the growth step (one lvextend)", f"{seconds:.2f} s"))
    TIMES.append(("of which the device was suspended", f"{suspended * 1000:.1f} ms" if suspended else "no sample met it"))
    TIMES.append(("slowest write of that load", f"{load.slowest * 1000:.0f} ms"))
    run("fvd-lv", "info", made.volume)
    now = int(made.show()["lv_size"])
    holds(now >= 2 * step, f"the logical volume grew under the load: {size(first_bytes)} before, {size(now)} now")
    return load, grown


def show_promises(made: Made, now: int) -> None:
    """`now`: the size of the disk's logical volume."""
    volume, group = made.volume, made.group
    title("5. The group, and what it has promised")
    run("fvd-lv", "list", group)
    listed = answer("fvd-lv", "list", group, "--output", "json")
    [row] = [row for row in listed["volumes"] if row["volume"] == volume]
    [figures] = listed["groups"]
    holds(row["state"] == "served" and row["storage_size"] == now, "the disk is in the list, with what lvs says it has")
    promised = figures["greatest_bytes"] / (figures["storage_bytes"] + figures["free_bytes"])
    holds(abs(figures["overcommit"] - promised) < 0.001, f"{group} has promised its disks {promised:.2f} times what they can have")


def add_storage_by_hand(volume: str, step: int, events: Events, before: int) -> None:
    title("6. Storage that is added by hand")
    steps = len(events.all("extend_started"))
    begin = time.monotonic()
    run("lvextend", "--size", f"+{step // 4 // MIB}m", volume)
    ended = time.monotonic()
    while (now := info(volume)["storage_size"]) < before + step // 4 and time.monotonic() < ended + WAIT_SECONDS:
        time.sleep(0.1)
    holds(now >= before + step // 4, f"udev told the server: {size(before)} before, {size(now)} now, and nothing had to be said to fvd")
    holds(len(events.all("extend_started")) == steps, "no growth step of its own was needed")
    TIMES.append(("lvextend by hand, until info shows it", f"{time.monotonic() - begin:.2f} s"))


def close_and_remove(made: Made, server: subprocess.Popen[str], free_at_first: int) -> None:
    volume, group = made.volume, made.group
    title("12. Closed, and removed")
    stop_server(server)
    lv = made.show()
    holds(lv["lv_active"] == "" and not made.device.exists(), "after a clean close it is inactive again")
    run("fvd-lv", "check", volume)
    holds(info(volume)["clean"] is True, "and the disk is clean")
    holds(made.row()["lv_active"] == "", "looking at it has not left it active")
    run("fvd-lv", "remove", volume)
    made.give_back_group()
    run("lvs", volume, expect=5)
    holds(not made.names(), "removed: it is gone")
    say(f"{size(made.free())} are free in {group}; there were {size(free_at_first)} at first")


def full_group(made: Made, step: int, events: Events, uri: str, places: list[int]) -> None:
    """Writes that wait in a full group, and go on by themselves when it gets a device."""
    volume, group, spare = made.volume, made.group, made.spare
    assert spare is not None
    rest = made.free() - step // 2
    if rest > 0:
        say(f"Another volume takes what {group} has free, but for half a growth step.")
        untouched = ("--activate", "n", "--zero", "n", "--wipesignatures", "n")
        run("lvcreate", "--yes", *untouched, "--size", f"{rest}b", "--name", made.rest, group)
    free_chunks = (info(volume)["free_bytes"] + made.free()) // CHUNK
    load = Client(uri, places, PIECE)
    say(f"{free_chunks + BEYOND_FULL} allocating writes, where there is space for {free_chunks}")
    failed: list[Exception] = []

    def write() -> None:
        try:
            load.write(free_chunks + BEYOND_FULL)
        except Exception as error:
            failed.append(error)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    events.wait("group_full")
    deadline = time.monotonic() + WAIT_SECONDS
    while (state := info(volume))["waiting_writes"] == 0 and time.monotonic() < deadline and writer.is_alive():
        time.sleep(0.1)
    events.show("group_full")
    run("tail", "-n", "1", str(LOG))
    waiting = state["waiting_writes"]
    holds(waiting > 0 and not failed, f"the group is full: {waiting} allocating writes wait, none has failed")
    run("vgs", "-o", "vg_name,vg_size,vg_free", group)
    holds(made.free() == 0, "what was left, less than a step, has been taken")
    other = Client(uri, load.flushed[:IN_FLIGHT], PIECE)
    other.write(IN_FLIGHT)
    other.verify(other.flushed)
    other.close()
    holds(info(volume)["waiting_writes"] > 0, f"beside them {IN_FLIGHT} overwrites, a flush and {IN_FLIGHT} reads went on")

    begin = time.monotonic()
    made.spare_was_used = True
    run("vgextend", group, spare)
    writer.join(WAIT_SECONDS)
    holds(not writer.is_alive() and not failed, "the group got a device: the writes went on by themselves")
    TIMES.append(("vgextend, until the last of the waiting writes was flushed", f"{time.monotonic() - begin:.2f} s"))
    holds(info(volume)["waiting_writes"] == 0, "none waits any more")
    reader = Client(uri, [], PIECE)
    reader.verify(load.flushed)
    reader.close()
    load.close()
    holds(True, f"all {len(load.flushed)} pieces read back as written")


# --- In a guest ------------------------------------------------------------------------------------------------------------------


def in_uml() -> bool:
    return "User Mode Linux" in Path("/proc/cpuinfo").read_text()


def in_guest() -> int:
    """The same, on a group of its own in a User-Mode Linux guest; its exit status."""
    if shutil.which("linux.uml") is None:
        refuse("User-Mode Linux is not installed: make setup installs it (apt-get install user-mode-linux)")
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < WRITTEN_BYTES:
        refuse(f"{tempfile.gettempdir()} has {size(free)} free; the guest's disks need {size(WRITTEN_BYTES)}. Set TMPDIR")
    with tempfile.TemporaryDirectory(prefix="fvd-demo-disks-") as folder:
        words = [sys.executable, str(ROOT / "scripts" / "uml"), "--timeout", str(GUEST_SECONDS)]
        words += ["--disk", f"{folder}/group.img:{GROUP_SIZE}", "--disk", f"{folder}/spare.img:{SPARE_SIZE}"]
        words += ["--", "sh", "-c", GUEST, "sh", sys.executable, str(ROOT / "scripts" / "demo")]
        # A folder of this machine's is no place for the guest's control sockets: inotify does not see what comes into it there.
        guest = subprocess.Popen(words, env={name: value for name, value in os.environ.items() if name != "FVD_RUNTIME_DIR"})
        # The guest ends by itself, at once: only its disks are left to be removed.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: guest.send_signal(number))
        return guest.wait()
