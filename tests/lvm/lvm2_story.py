# SPDX-License-Identifier: Apache-2.0
"""What is asked of lvm2 where something is absent, held, full, foreign, missing: told on a real lvm2, and from what each version answered.

`told_for_real` runs it on devices of the caller's and keeps every answer; `told_again` plays kept answers. Both check the same outcomes: so
an answer is what a real lvm2 of that version has said, and what fvd makes of it does not depend on the version. To record anew, in a guest:
    python3 tests/lvm/lvm2_story.py FILE DEVICE DEVICE DEVICE
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fvd.errors import FvdError
from fvd.lvm import members, runner
from fvd.lvm.commands import Lvm
from fvd.lvm.members import Labelled
from fvd.lvm.report import LogicalVolume
from fvd.lvm.runner import Finished

MIB = 1 << 20
TAG = "fvd.unfinished"
RECORDED = Path(__file__).resolve().parent / "recorded"
# Of a host that likes it otherwise: all of it would change what is read, were it not overridden.
HOST_CONFIGURATION = """
report { output_format="json_std" compact_output=1 compact_output_cols="lv_tags" prefixes=1 columns_as_rows=1 binary_values_as_numeric=1 }
log { report_command_log=1 verbose=1 silent=1 prefix="host: " command_names=1 }
global { units="m" suffix=1 }
devices { use_devicesfile=1 filter=[ "r|.*|" ] global_filter=[ "r|.*|" ] }
"""
LABEL_BYTES = MIB

Answer = dict[str, Any]  # words (without the configuration), exit_code, stdout, stderr
Ask = Callable[[str, Callable[[Lvm], object], str], None]
Do = Callable[..., None]


def story(ask: Ask, do: Do, devices: Sequence[str]) -> None:
    """`ask(step, question, outcome)`: the outcome is what is returned, or the type of the error, and a part of what it says.
    `do`: a command that changes the machine."""
    found = Found()
    volumes_come_and_grow(ask, do, devices, found)
    host_is_odd(ask, do, found)
    devices_refuse_and_vanish(ask, do, devices, found)
    volume_goes(ask, found)


class Found(dict[str, LogicalVolume]):
    """The volumes that were found, as they were then: name -> volume."""

    def finds(self, name: str) -> Callable[[Lvm], object]:
        def find(lvm: Lvm) -> object:
            volume = lvm.find("vg0", name)
            if volume is not None:
                self[name] = volume
            return None if volume is None else f"{volume.full_name} {volume.size_bytes // MIB} {'open' if volume.open else 'closed'}"

        return find


def figures(lvm: Lvm) -> str:
    group = lvm.group("vg0")
    obtainable = "all" if group.obtainable_bytes() == group.free_bytes else str(group.obtainable_bytes())
    return f"free, {obtainable} to be had, {len(group.physical)} devices"


def volumes_come_and_grow(ask: Ask, do: Do, devices: Sequence[str], found: Found) -> None:
    first, second, _ = devices
    do("vgcreate", "--quiet", "vg0", first)
    do("vgcreate", "--quiet", "--yes", "--systemid", "another", "vg1", second)
    ask("absent volume", found.finds("vm1"), "None")
    ask("absent group, a volume in it", lambda lvm: lvm.find("nope", "vm1"), "None")
    ask("absent group", lambda lvm: lvm.group("nope"), "NotFound: there is no volume group nope")
    ask("absent group, its volumes", lambda lvm: lvm.volumes("nope"), 'NotFound: lvs: Volume group "nope" not found')
    ask("one group of two is absent", lambda lvm: lvm.groups("vg0", "nope"), 'NotFound: vgs: Volume group "nope" not found')
    ask("empty group", lambda lvm: lvm.volumes("vg0"), "[]")
    ask("create", lambda lvm: lvm.create("vg0", "vm1", 64 * MIB, [TAG]), "None")
    ask("create what is there", lambda lvm: lvm.create("vg0", "vm1", 64 * MIB, [TAG]), "Conflict: lvcreate: Logical Volume ")
    ask("create what is too large", lambda lvm: lvm.create("vg0", "vm2", 1 << 40, [TAG]), "NoSpace: lvcreate: Volume group ")
    ask("create in an absent group", lambda lvm: lvm.create("nope", "vm2", 64 * MIB, [TAG]), "NotFound: there is no volume group nope")
    ask("found", found.finds("vm1"), "vg0/vm1 64 closed")
    ask("extend", lambda lvm: lvm.extend("vg0", "vm1", 96 * MIB), "True")
    ask("extend to what it has", lambda lvm: lvm.extend("vg0", "vm1", 96 * MIB), "False")
    ask("extend to less", lambda lvm: lvm.extend("vg0", "vm1", 64 * MIB), "False")
    ask("extend beyond the group", lambda lvm: lvm.extend("vg0", "vm1", 1 << 40), "NoSpace: lvextend: Insufficient free space: ")
    ask("extend what is absent", lambda lvm: lvm.extend("vg0", "vm2", 64 * MIB), "NotFound: lvextend: ")
    ask("extend in an absent group", lambda lvm: lvm.extend("nope", "vm2", 64 * MIB), "NotFound: there is no volume group nope")
    ask("a group of another host", lambda lvm: lvm.volumes("vg1"), "InUse: lvs: Cannot access VG vg1 with system ID another")
    ask("create in a group of another host", lambda lvm: lvm.create("vg1", "vm1", 64 * MIB, [TAG]), "InUse: vgs: Cannot access VG vg1")
    do("hold", "/dev/vg0/vm1")
    ask("found, held", found.finds("vm1"), "vg0/vm1 96 open")
    ask("deactivate what is held", lambda lvm: lvm.deactivate(found["vm1"]), "InUse: lvchange: Logical volume vg0/vm1 in use.")
    ask("remove what is held", lambda lvm: lvm.remove(found["vm1"], TAG), "InUse: lvremove: Logical volume vg0/vm1 in use.")
    do("let go")


def host_is_odd(ask: Ask, do: Do, found: Found) -> None:
    """Its configuration would change what is read, were it not overridden."""
    do("host", HOST_CONFIGURATION)
    ask("odd host: found", found.finds("vm1"), "vg0/vm1 96 closed")
    ask("odd host: absent volume", found.finds("vm2"), "None")
    ask("odd host: absent group", lambda lvm: lvm.find("nope", "vm1"), "None")
    ask("odd host: create what is there", lambda lvm: lvm.create("vg0", "vm1", 64 * MIB, [TAG]), "Conflict: lvcreate: Logical Volume ")
    ask("odd host: extend", lambda lvm: lvm.extend("vg0", "vm1", 128 * MIB), "True")
    ask("odd host: extend to what it has", lambda lvm: lvm.extend("vg0", "vm1", 128 * MIB), "False")
    ask("odd host: extend beyond the group", lambda lvm: lvm.extend("vg0", "vm1", 1 << 40), "NoSpace: lvextend: Insufficient free space: ")
    ask("odd host: pieces", lambda lvm: [len(pieces) for pieces in lvm.pieces("vg0").values()], "[1]")
    do("host", "")


def devices_refuse_and_vanish(ask: Ask, do: Do, devices: Sequence[str], found: Found) -> None:
    first, _, third = devices
    do("pvchange", "--quiet", "--allocatable", "n", first)
    ask("no device may be allocated from", lambda lvm: lvm.extend("vg0", "vm1", 256 * MIB), "NoSpace: lvextend: Insufficient free space: ")
    ask("no device may be allocated from: figures", figures, "free, 0 to be had, 1 devices")
    do("pvchange", "--quiet", "--allocatable", "y", first)
    do("vgextend", "--quiet", "vg0", third)
    ask("a device was added", figures, "free, all to be had, 2 devices")
    do("lvcreate", "--quiet", "--yes", "--stripes", "2", "--size", "64m", "--name", "striped", "vg0")
    do("lvcreate", "--quiet", "--yes", "--extents", "100%PVS", "--name", "full", "vg0", third)
    ask("a stripe has no space", lambda lvm: lvm.extend("vg0", "striped", 256 * MIB), "NoSpace: lvextend: Insufficient suitable ")
    do("lvchange", "--quiet", "--activate", "n", "vg0/striped", "vg0/full")
    do("hide", third)
    ask("a device is missing: found", found.finds("vm1"), "vg0/vm1 128 closed")
    ask("a device is missing", lambda lvm: lvm.extend("vg0", "vm1", 256 * MIB), "DeviceError: volume group vg0 lacks physical volume ")
    ask("a device is missing: tags", lambda lvm: lvm.retag(found["vm1"], add=["x"]), "DeviceError: volume group vg0 lacks physical volume ")
    do("lvchange", "--quiet", "--activate", "n", "vg0/vm1")
    ask("a device is missing: activate", lambda lvm: lvm.activate(found["vm1"]), "None")
    ask("a device is missing: figures", figures, "free, 0 to be had, 2 devices")
    do("show", third)


def volume_goes(ask: Ask, found: Found) -> None:
    ask("deactivate", lambda lvm: lvm.deactivate(found["vm1"]), "None")
    ask("remove", lambda lvm: lvm.remove(found["vm1"], TAG), "None")
    ask("remove what is gone", lambda lvm: lvm.remove(found["vm1"], TAG), "None")


def outcome_of(question: Callable[[Lvm], object]) -> str:
    try:
        return str(question(Lvm()))
    except FvdError as error:
        return f"{type(error).__name__}: {error}"


def check(step: str, question: Callable[[Lvm], object], expected: str) -> None:
    outcome = outcome_of(question)
    good = outcome.startswith(expected) if ": " in expected else outcome == expected
    assert good, f"{step}: {outcome!r}, not {expected!r}"


def plain(words: Sequence[str]) -> list[str]:
    """Without the configuration, and the list of devices: those have other names on each machine."""
    kept = list(words)
    for option in ("--config", "--devices"):
        if option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return kept


@contextlib.contextmanager
def instead(run: Callable[..., Finished], labelled: Callable[..., Any], in_use: Callable[..., Any]) -> Iterator[None]:
    """What asks the machine, replaced."""
    real = runner.run_command, members.labelled, members.in_use
    runner.run_command, members.labelled, members.in_use = run, labelled, in_use
    try:
        yield
    finally:
        runner.run_command, members.labelled, members.in_use = real


# --- On a real lvm2 --------------------------------------------------------------------------------------------------------------


def told_for_real(devices: Sequence[str]) -> dict[str, list[Answer]]:
    """What lvm2 has answered, by step. Leaves nothing on the devices. /etc/lvm must be one's own (a guest's)."""
    answers: dict[str, list[Answer]] = {}
    holders: list[subprocess.Popen[bytes]] = []
    configuration = Path("/etc/lvm/lvm.conf")
    before = configuration.read_text()
    real, labelled, in_use = runner.run_command, members.labelled, members.in_use
    hidden: dict[str, bytes] = {}
    Lvm.forget()

    def ask(step: str, question: Callable[[Lvm], object], expected: str) -> None:
        kept = answers.setdefault(step, [])

        def keep(words: Sequence[str], timeout_seconds: float) -> Finished:
            done = real(words, timeout_seconds)
            kept.append({"words": plain(words), "exit_code": done.exit_code, "stdout": done.stdout, "stderr": done.stderr})
            return done

        def keep_labelled() -> list[Labelled] | None:
            found = labelled()
            kept.append({"words": ["labelled"], "found": None if found is None else [[each.path, each.uuid] for each in found]})
            return found

        def keep_in_use(group: str) -> dict[tuple[int, int], str]:
            found = in_use(group)
            kept.append({"words": ["in_use", group], "found": [[*number, path] for number, path in found.items()]})
            return found

        with instead(keep, keep_labelled, keep_in_use):
            check(step, question, expected)

    def do(*words: str) -> None:
        if words[0] == "hold":
            with Path(words[1]).open("rb") as device:
                holders.append(subprocess.Popen(["sleep", "600"], stdin=device))
        elif words[0] == "let go":
            end_holders()
        elif words[0] == "host":
            configuration.write_text(before + words[1])
        elif words[0] in ("hide", "show"):
            with Path(words[1]).open("r+b", buffering=0) as device:
                if words[0] == "hide":
                    hidden[words[1]] = device.read(LABEL_BYTES)
                    device.seek(0)
                device.write(hidden[words[1]] if words[0] == "show" else bytes(LABEL_BYTES))
                os.fsync(device.fileno())
            subprocess.run(["udevadm", "trigger", "--settle", words[1]], check=True)
        else:
            subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def end_holders() -> None:
        while holders:
            holder = holders.pop()
            holder.kill()
            holder.wait()

    try:
        story(ask, do, devices)
    finally:
        end_holders()
        configuration.write_text(before)
        for group in ("vg0", "vg1"):
            words = ["vgremove", "--quiet", "--force", "--force", "--yes", "--config", 'local{extra_system_ids=["another"]}', group]
            subprocess.run(words, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for device in devices:
            subprocess.run(["pvremove", "--quiet", "--force", "--force", "--yes", device], check=False, stdout=subprocess.DEVNULL)
    return answers


# --- From what was kept ----------------------------------------------------------------------------------------------------------


def told_again(answers: dict[str, list[Answer]]) -> None:
    Lvm.forget()

    def ask(step: str, question: Callable[[Lvm], object], expected: str) -> None:
        left = list(answers[step])

        def next_of(words: list[str]) -> Answer:
            answer = next((answer for answer in left if answer["words"] == words), None)
            assert answer is not None, f"{step}: {words} was never asked; record anew"
            left.remove(answer)
            return answer

        def play(words: Sequence[str], timeout_seconds: float) -> Finished:
            answer = next_of(plain(words))
            return Finished(tuple(words), answer["exit_code"], answer["stdout"], answer["stderr"], 0.0)

        def labelled() -> list[Labelled] | None:
            found = next_of(["labelled"])["found"]
            return None if found is None else [Labelled(*each) for each in found]

        def in_use(group: str) -> dict[tuple[int, int], str]:
            return {(major, minor): path for major, minor, path in next_of(["in_use", group])["found"]}

        with instead(play, labelled, in_use):
            check(step, question, expected)
        assert not left, f"{step}: {[answer['words'] for answer in left]} is asked no more; record anew"

    story(ask, lambda *words: None, ("/dev/a", "/dev/b", "/dev/c"))
    Lvm.forget()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(told_for_real(sys.argv[2:]), indent=1) + "\n")
