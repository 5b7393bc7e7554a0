# SPDX-License-Identifier: Apache-2.0
"""Every command on closed disks, as a user types it: results, errors, exit codes, JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fvd_commands import COMMAND, Done

from fvd.modes import LAYOUTS

pytestmark = pytest.mark.pure

GIB = 1 << 30
MIB = 1 << 20

FvdLv = Callable[..., Done]

INFO_TYPES: dict[str, tuple[type, ...]] = {
    "schema_version": (int,),
    "volume": (str,),
    "uuid": (str,),
    "virtual_size": (int,),
    "mapped_bytes": (int,),
    "storage_size": (int,),
    "metadata_size": (int,),
    "max_storage_size": (int,),
    "free_bytes": (int,),
    "low_water_bytes": (int,),
    "can_grow": (bool,),
    "block_size": (int,),
    "chunk_size": (int,),
    "journal_size": (int,),
    "grow_step": (int,),
    "layout": (str,),
    "placement": (str,),
    "base": (dict, type(None)),
    "clean": (bool,),
    "created_seconds": (int,),
    "uri": (str, type(None)),
    "vhost_user": (str, type(None)),
    "queues": (int,),
    "guests": (int,),
    "attached": (str, type(None)),
    "read_only": (bool,),
    "present_bytes": (int,),
    "cache": (str, type(None)),
    "on_full": (str, type(None)),
    "waiting_writes": (int,),
    "failed": (bool,),
    "failed_errno": (int,),
    "failed_reason": (str,),
    "failed_seconds": (float, type(None)),
    "failed_source": (str,),
    "growth": (dict, type(None)),
    "statistics": (dict, type(None)),
    "copy_on_read": (bool,),
    "prefetch_default": (bool,),
    "prefetch": (dict, type(None)),
    "base_released": (bool,),
    "possible_loss": (dict, type(None)),
    "pending_log": (str, type(None)),
    "left_open": (bool,),
    "pending_changes": (int,),
    "no_room_below": (bool,),
    "stopped": (str,),
    "notices": (list,),
}


def check_types(answer: dict[str, Any], types: dict[str, tuple[type, ...]]) -> None:
    """Exactly these keys, each of its type: programs are written against them."""
    assert {name: type(value) in types.get(name, ()) for name, value in answer.items()} == dict.fromkeys(types, True)


# --- provision -----------------------------------------------------------------------------------------------------------------


def test_provision_takes_little(fvd_lv: FvdLv, workdir: Path) -> None:
    done = fvd_lv("provision", "file:a", "--size", "100G")
    assert done.out.startswith("file:a: provisioned\n")
    status = (workdir / "a").stat()
    assert status.st_size == 5 * GIB
    assert status.st_blocks * 512 < 32 * MIB
    assert status.st_mode & 0o077 == 0


def test_provision_json(fvd_lv: FvdLv, workdir: Path) -> None:
    answer = fvd_lv("provision", "file:a", "--size", "10G", "--output", "json").json
    check_types(answer, INFO_TYPES | {"created": (bool,)})
    assert answer["created"] is True
    assert answer["volume"] == f"file:{workdir / 'a'}"


def test_provision_again(fvd_lv: FvdLv) -> None:
    first = fvd_lv("provision", "file:a", "--size", "10G", "--output", "json").json
    again = fvd_lv("provision", "file:./a", "--size", "10240M", "--output", "json").json
    assert again == first | {"created": False}
    assert "with the same parameters" in fvd_lv("provision", "file:a", "--size", "10G").out


def test_provision_with_other_parameters_is_a_conflict(fvd_lv: FvdLv) -> None:
    fvd_lv("provision", "file:a", "--size", "10G")
    done = fvd_lv("provision", "file:a", "--size", "10G", "--block-size", "4K", code=4)
    assert done.err.startswith("fvd-lv: ")
    assert done.err.count("\n") == 1
    assert "block_size" in done.err


def test_provision_does_not_overwrite_a_file(fvd_lv: FvdLv, workdir: Path) -> None:
    (workdir / "a").write_bytes(b"precious" * 1000)
    assert "--force" in fvd_lv("provision", "file:a", "--size", "10G", code=4).err
    assert (workdir / "a").read_bytes() == b"precious" * 1000
    fvd_lv("provision", "file:a", "--size", "10G", "--force")
    fvd_lv("info", "file:a")


def test_provision_with_everything(fvd_lv: FvdLv, workdir: Path) -> None:
    (workdir / "base").write_bytes(os.urandom(3 * MIB))
    options = "--block-size 4K --chunk-size 64K --journal-size 64K --grow-step 1M --placement spread --base base --size 8M"
    for layout in LAYOUTS:
        answer = fvd_lv("provision", f"file:{layout}", "--layout", layout, *options.split(), "--output", "json").json
        assert (answer["block_size"], answer["chunk_size"], answer["journal_size"]) == (4096, 65536, 65536)
        assert (answer["grow_step"], answer["layout"], answer["virtual_size"]) == (MIB, layout, 8 * MIB)
        assert answer["base"] == {"path": str(workdir / "base"), "size": 3 * MIB, "format": "raw"}
        assert fvd_lv("check", f"file:{layout}").code == 0


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["file:a", "--size", "lots"], 2, "'lots' is not a size"),
        (["file:a"], 2, "--size"),
        (["file:a", "--size", "100"], 2, "virtual size"),
        (["file:a", "--size", "1G", "--block-size", "3K"], 2, "power of two"),
        (["file:a", "--size", "1G", "--block-size", "1M", "--chunk-size", "64K"], 2, "chunk size"),
        (["file:a", "--size", "1G", "--layout", "qcow2"], 2, "qcow2"),
        (["file:a", "--size", "1G", "--base", "absent"], 3, "absent"),
        (["file:no/such/folder/a", "--size", "1G"], 3, "folder"),
        (["/dev/no-such-device", "--size", "1G"], 3, "/dev/no-such-device"),
        (["nonsense", "--size", "1G"], 2, "file:PATH"),
        (["fvd-no-such-group/vm1", "--size", "1G"], 3, "no volume group fvd-no-such-group"),
    ],
)
def test_provision_errors(fvd_lv: FvdLv, workdir: Path, words: list[str], code: int, text: str) -> None:
    done = fvd_lv("provision", *words, code=code)
    assert text in done.err
    assert done.err.startswith("fvd-lv: ") and done.err.count("\n") == 1
    assert done.out == ""
    assert list(workdir.iterdir()) == []


# --- info, map, check, dump ----------------------------------------------------------------------------------------------------


def test_info(fvd_lv: FvdLv, workdir: Path) -> None:
    fvd_lv("provision", "file:a", "--size", "100G")
    answer = fvd_lv("info", "file:a", "--output", "json").json
    check_types(answer, INFO_TYPES)
    assert answer["virtual_size"] == 100 * GIB
    assert answer["mapped_bytes"] == 0
    assert answer["storage_size"] == 5 * GIB
    assert answer["max_storage_size"] == answer["metadata_size"] + 100 * GIB
    assert answer["free_bytes"] == 5 * GIB - answer["metadata_size"]
    assert answer["clean"] is True
    text = fvd_lv("info", "file:a").out
    for piece in ("virtual size", "100 GiB", "growth reserve", "compact", "clean"):
        assert piece in text


def test_info_of_what_is_no_disk(fvd_lv: FvdLv, workdir: Path) -> None:
    assert fvd_lv("info", "file:absent", code=3).err.startswith("fvd-lv: ")
    (workdir / "zeros").write_bytes(bytes(2 * MIB))
    assert "no fvd disk" in fvd_lv("info", "file:zeros", code=3).err
    answer = json.loads(fvd_lv("--output", "json", "info", "file:zeros", code=3).out)
    assert answer["schema_version"] == 1
    assert answer["error"]["kind"] == "not_found"
    assert answer["error"]["exit_code"] == 3
    assert answer["error"]["volume"] == "file:zeros"


def test_map_of_an_empty_disk(fvd_lv: FvdLv) -> None:
    fvd_lv("provision", "file:a", "--size", "10G")
    answer = fvd_lv("map", "file:a", "--output", "json").json
    check_types(
        answer,
        {
            "schema_version": (int,),
            "volume": (str,),
            "offset": (int,),
            "length": (int,),
            "chunk_size": (int,),
            "data_offset": (int,),
            "storage_size": (int,),
            "extents": (list,),
        },
    )
    assert answer["extents"] == [{"start": 0, "length": 10 * GIB, "state": "zero", "storage_offset": None}]
    assert fvd_lv("map", "file:a").out.splitlines()[0].split() == ["start", "length", "state", "storage", "offset"]
    assert "one mark is" in fvd_lv("map", "file:a", "--picture", "always").out


def test_map_of_a_part(fvd_lv: FvdLv, workdir: Path) -> None:
    (workdir / "base").write_bytes(os.urandom(3 * MIB))
    fvd_lv("provision", "file:a", "--size", "10G", "--base", "base")
    answer = fvd_lv("map", "file:a", "--offset", "2M", "--length", "4M", "--output", "json").json
    assert [(extent["start"], extent["length"], extent["state"]) for extent in answer["extents"]] == [
        (2 * MIB, MIB, "base"),
        (3 * MIB, 3 * MIB, "zero"),
    ]
    fvd_lv("map", "file:a", "--offset", "11G", code=2)


def test_check(fvd_lv: FvdLv, workdir: Path) -> None:
    fvd_lv("provision", "file:a", "--size", "10G")
    answer = fvd_lv("check", "file:a", "--output", "json").json
    check_types(
        answer,
        {
            "schema_version": (int,),
            "volume": (str,),
            "clean": (bool,),
            "mapped_chunks": (int,),
            "mapped_bytes": (int,),
            "commits_replayed": (int,),
            "errors": (list,),
            "warnings": (list,),
            "served": (bool,),
        },
    )
    assert answer["errors"] == []
    before = (workdir / "a").read_bytes()[: 64 * MIB] if (workdir / "a").stat().st_size < 64 * MIB else None
    with (workdir / "a").open("r+b") as file:
        file.seek(17 * MIB + 100)  # a cell of the bitmap
        file.write(b"rot")
    done = fvd_lv("check", "file:a", code=7)
    assert "damaged" in done.out + done.err
    assert before is None or before == (workdir / "a").read_bytes()


def test_dump(fvd_lv: FvdLv, workdir: Path) -> None:
    fvd_lv("provision", "file:a", "--size", "10G")
    answer = fvd_lv("dump", "file:a", "--output", "json").json
    assert "superblocks" in answer
    assert json.loads(fvd_lv("dump", "file:a").out)


# --- extend, list, remove ------------------------------------------------------------------------------------------------------


def test_extend(fvd_lv: FvdLv, workdir: Path) -> None:
    fvd_lv("provision", "file:a", "--size", "100G")
    answer = fvd_lv("extend", "file:a", "--output", "json").json
    assert answer == {"schema_version": 1, "volume": f"file:{workdir / 'a'}", "storage_size": 10 * GIB, "added_bytes": 5 * GIB}
    assert "12.0 GiB" in fvd_lv("extend", "file:a", "--by", "2G").out
    assert fvd_lv("info", "file:a", "--output", "json").json["storage_size"] == 12 * GIB
    fvd_lv("extend", "file:a", "--by", "0", code=2)


def test_extend_never_beyond_what_the_disk_can_use(fvd_lv: FvdLv) -> None:
    fvd_lv("provision", "file:a", "--size", "10G")
    fvd_lv("extend", "file:a", "--by", "1000G")
    answer = fvd_lv("info", "file:a", "--output", "json").json
    assert answer["storage_size"] == answer["max_storage_size"]
    assert fvd_lv("extend", "file:a", "--output", "json").json["added_bytes"] == 0


def test_list(fvd_lv: FvdLv, workdir: Path) -> None:
    assert fvd_lv("list", "--output", "json").json["volumes"] == []
    (workdir / "other").write_bytes(b"no disk")
    (workdir / "folder").mkdir()
    fvd_lv("provision", "file:a", "--size", "10G")
    fvd_lv("provision", "file:folder/b", "--size", "20G")
    [listed] = fvd_lv("list", "--output", "json").json["volumes"]
    assert set(listed) == {"volume", "state", "info", "problem", "group", "storage_size", "virtual_size", "greatest_size"}
    assert listed["volume"] == f"file:{workdir / 'a'}"
    assert listed["state"] == "closed"
    check_types(listed["info"], {name: types for name, types in INFO_TYPES.items() if name != "schema_version"})
    both = fvd_lv("list", ".", "folder", "--output", "json").json["volumes"]
    assert [each["info"]["virtual_size"] for each in both] == [10 * GIB, 20 * GIB]
    assert fvd_lv("list", "--served", "--output", "json").json["volumes"] == []
    assert "VOLUME" in fvd_lv("list").out
    fvd_lv("list", "no-such-folder", code=3)


def test_list_shows_damaged_disks(fvd_lv: FvdLv, workdir: Path) -> None:
    fvd_lv("provision", "file:a", "--size", "10G")
    with (workdir / "a").open("r+b") as file:
        for offset in (0, 524288):
            file.seek(offset + 100)
            file.write(b"rot")
    [listed] = fvd_lv("list", "--output", "json").json["volumes"]
    assert (listed["state"], listed["info"]) == ("corrupt", None)
    assert "corrupt" in fvd_lv("list").out


def test_remove(fvd_lv: FvdLv, workdir: Path) -> None:
    fvd_lv("provision", "file:a", "--size", "10G")
    assert fvd_lv("remove", "file:a", "--output", "json").json == {"schema_version": 1, "volume": "file:a", "removed": True}
    assert not (workdir / "a").exists()
    assert fvd_lv("remove", "file:a", "--output", "json").json["removed"] is False
    (workdir / "precious").write_bytes(b"no disk" * 100_000)
    fvd_lv("remove", "file:precious", code=4)
    assert (workdir / "precious").exists()


# --- The command itself --------------------------------------------------------------------------------------------------------


def test_usage_errors(fvd_lv: FvdLv) -> None:
    assert "COMMAND" in fvd_lv(code=2).err
    assert "there is no command 'explode'" in fvd_lv("explode", code=2).err
    assert "fvd-lv info --help" in fvd_lv("info", code=2).err
    assert json.loads(fvd_lv("info", "--output", "json", code=2).out)["error"]["kind"] == "invalid_argument"


def test_version_and_help(fvd_lv: FvdLv) -> None:
    import fvd

    assert fvd_lv("--version").out == f"fvd-lv {fvd.__version__}\n"
    assert "exit codes" in fvd_lv("--help").out


def test_a_reader_that_leaves_is_no_error(workdir: Path, fvd_lv: FvdLv) -> None:
    fvd_lv("provision", "file:a", "--size", "10G")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "info", "file:a"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c(workdir: Path) -> None:
    """A provision so large that it takes a while, interrupted: exit code 130, one line, no traceback, and it can be run again."""
    words = ["provision", "file:a", "--size", "16T", "--block-size", "4K", "--journal-size", "1G"]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(workdir.iterdir()) and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the provision was faster than the signal")
    assert process.returncode == 130, err
    assert err == "fvd-lv: file:a: interrupted; run the command again to finish\n"
    assert not (workdir / "a").exists()
