# SPDX-License-Identifier: Apache-2.0
"""Each field of a superblock says what it likes, sealed with a checksum that is right, and every command has to do with it: it ends with
an answer or with an error that says what is wrong, and nothing that reaches the terminal is obeyed by it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fvd_commands import Done

import fvd
from fvd import _core
from fvd.cli.main import main
from fvd.errors import FvdError
from fvd.format.superblock import PENDING_LOG, POSSIBLE_LOSS, SLOT_OFFSETS_BYTES, SUPERBLOCK, SUPERBLOCK_BYTES, LossReason, decode

pytestmark = pytest.mark.pure

# A clear screen, a title, a line that was not there; and what a program that looks for control characters alone lets through: text that
# runs backwards, separators of lines.
WORDS = "/x\x1b[2J\x1b]0;t\x07\r\nfvd-lv: all is well"
TURNED = "/\u202ex\u2028y\u2066z"


def forge(path: Path, **fields: int | bytes) -> None:
    """Both slots say so, each sealed. Text fields are cut or padded, and their sizes follow unless they are said too."""
    with path.open("r+b") as file:
        for slot, offset in enumerate(SLOT_OFFSETS_BYTES):
            file.seek(offset)
            page = np.frombuffer(file.read(SUPERBLOCK_BYTES), SUPERBLOCK).copy()
            row = page[0]
            row["generation"] = 4 - slot
            for name, value in fields.items():
                if isinstance(value, bytes):
                    capacity = SUPERBLOCK.dtype[name].itemsize
                    row[name] = np.void(value[:capacity].ljust(capacity, b"\0"))
                    if f"{name}_size" in (SUPERBLOCK.names or ()) and f"{name}_size" not in fields:
                        row[f"{name}_size"] = min(capacity, len(value))
                else:
                    row[name] = value & (256 ** SUPERBLOCK.dtype[name].itemsize - 1)
            if int(row["generation"]) % 2 != slot and "generation" in fields:
                row["generation"] = int(row["generation"]) ^ 1
            raw = page.view(np.uint8)
            row["checksum"] = _core.checksum(row["uuid"].tobytes(), offset, raw, 8)
            file.seek(offset)
            file.write(raw.tobytes())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("forged")
    (folder / "base.raw").write_bytes(bytes(4096))
    fvd.provision(f"file:{folder}/disk", "64M", base=folder / "base.raw", journal_size="64K", grow_step="16M")
    yield folder / "disk"
    shutil.rmtree(folder)


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path / "disk"))


class Commands:
    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path, self._capsys = path, capsys

    def run(self, *words: str) -> Done:
        try:
            code = main(words)
        except SystemExit as error:
            code = int(error.code or 0)
        said = self._capsys.readouterr()
        return Done(code, said.out, said.err)

    def every(self, what: str, *, serve: bool = False) -> None:
        """Every command on the disk. What it says can be shown, and none fails inside."""
        volume, is_read = f"file:{self.path}", False
        with self.path.open("rb") as file, suppress(FvdError):
            decode(file.read(SUPERBLOCK_BYTES), 0)
            is_read = True
        first = (("info", volume), ("dump", volume))
        more = (
            ("info", volume, "--output", "json"),
            ("list", str(self.path.parent)),
            ("map", volume),
            ("check", volume),
            ("prefetch", "status", volume),
            ("acknowledge", volume),
            ("extend", volume),
        )
        for words in (*first, *more) if is_read else first:
            done = self.run(*words)
            told = f"{what}: fvd-lv {' '.join(words)}: {done}"
            assert "internal error" not in done.err and "Traceback" not in done.err and done.code in range(13), told
            assert all(sign == "\n" or sign.isprintable() for sign in done.out + done.err), told
        if serve:
            for read_only in (True, False):
                socket = self.path.parent / "nbd"
                # Anything but our own errors is a failure.
                with suppress(FvdError), fvd.serve(volume, socket=socket, read_only=read_only, base_timeout_s=0.2) as served:
                    self._look(served, what)

    def _look(self, served: fvd.Served, what: str) -> None:
        for words in (("info",), ("check",), ("attach-info",), ("prefetch", "status")):
            done = self.run(*words, f"file:{self.path}")
            told = f"{what}: served: fvd-lv {' '.join(words)}: {done}"
            assert "internal error" not in done.err and "Traceback" not in done.err, told
            assert all(sign == "\n" or sign.isprintable() for sign in done.out + done.err), told


@pytest.fixture
def commands(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setenv("FVD_RUNTIME_DIR", str(path.parent / "run"))
    return Commands(path, capsys)


def features_for(name: str) -> dict[str, int]:
    """Without these a field means nothing, and has to be zero."""
    if name.startswith("loss"):
        return {"autoclear_features": POSSIBLE_LOSS, "loss_reason": int(LossReason.FLUSH_FAILED)}
    return {"autoclear_features": PENDING_LOG} if name.startswith("log") else {}


NUMBERS = [name for name in SUPERBLOCK.names or () if SUPERBLOCK.dtype[name].kind != "V" and name != "checksum"]
# What is not derived from the rest, or bound to be a power of two.
FREE = ("generation", "grow_step_bytes", "base_size_bytes", "created_seconds", "loss_seconds", "compatible_features", "autoclear_features")


@pytest.mark.parametrize("names", [NUMBERS[start::4] for start in range(4)], ids=str)
def test_numbers(commands: Commands, made: Path, names: list[str]) -> None:
    for name in names:
        values = (1, 253402300800, 2**63, 2**64 - 1) if name in FREE else (0, 1, 2**64 - 1)
        for value in values:
            shutil.copy(made, commands.path)
            forge(commands.path, **(features_for(name) | {name: value}))
            commands.every(f"{name} {value}", serve=name in FREE and value == values[-1])


@pytest.mark.parametrize("name", ["uuid", "magic", "log_path", "log_boot", "log_host", "reserved_a", "reserved_b", "reserved_c"])
def test_bytes(commands: Commands, made: Path, name: str) -> None:
    for value in (WORDS.encode(), TURNED.encode(), b"\xff" * 300):
        shutil.copy(made, commands.path)
        forge(commands.path, **(features_for(name) | {name: value}))
        commands.every(f"{name} {value!r}", serve=value == TURNED.encode())


@pytest.mark.parametrize("base_format", [1, 2, 3, 10])
def test_locators(commands: Commands, made: Path, base_format: int) -> None:
    locators = (WORDS, TURNED, "/", "/..", "/a" * 1500) if base_format in (1, 3) else ("nbd://host/\u202e", "rbd:a/b", "ssh://x@/\x9b2J")
    for value in (*(locator.encode() for locator in locators), b"/\xff\xfe", b"/x\0y", b""):
        shutil.copy(made, commands.path)
        forge(commands.path, base_format=base_format, base_locator=value)
        commands.every(f"base_locator {value!r} {base_format}", serve=value == TURNED.encode())
