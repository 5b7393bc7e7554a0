# SPDX-License-Identifier: Apache-2.0
"""fvd.base.base: what may be a base, how it is opened, and what is told from its contents, with a server and programs that are played."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from loops import loop_device, sparse

from fvd.base import images as base_images
from fvd.base import vhdx
from fvd.base.base import examine_base, open_base
from fvd.device.claim import Ownership, claim
from fvd.device.node import Identity
from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NotFound, PermissionDenied, Timeout, Unsupported
from fvd.format.locator import BaseFormat
from fvd.format.superblock import MAGIC, BaseReference

MIB = 1 << 20
NOBODY: Identity = ("file", 0, 0)
NBD = "nbd+unix:///x?socket=/run/x.sock"
MARKS = {
    "qcow2": (0, b"QFI\xfb\0\0\0\3"),
    "vmdk": (0, b"KDMV" + struct.pack("<IIQ", 1, 0, 2048)),
    "vhdx": (0, b"vhdxfile"),
    "vpc": (0, b"conectix"),
    "qed": (0, b"QED\0"),
    "parallels": (0, b"WithouFreSpacExt"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
}


def image(path: Path, kind: str, *more: tuple[int, bytes]) -> Path:
    data = bytearray(MIB)
    for offset, mark in (MARKS[kind], *more):
        data[offset : offset + len(mark)] = mark
    path.write_bytes(data)
    return path


class FakeRemote:
    """Shaped like fvd.device._remote.Remote."""

    made: ClassVar[list[FakeRemote]] = []
    size_bytes = MIB
    failures: ClassVar[list[FvdError]] = []

    def __init__(
        self,
        *,
        uri: str | None = None,
        command: list[str] | None = None,
        timeout_seconds: float = 30.0,
        name: str = "",
        inherited: int = -1,
        prepare: Callable[[], list[str]] | None = None,
    ) -> None:
        assert (uri is None) != (command is None)
        self.uri, self.command, self.timeout_seconds, self.name = uri, command, timeout_seconds, name
        self.inherited, self.prepare = inherited, prepare
        self.opened = self.closed = False
        FakeRemote.made.append(self)

    def open(self) -> None:
        if FakeRemote.failures:
            raise FakeRemote.failures.pop(0)
        self.opened = True

    def zero_extents(self) -> Iterator[tuple[int, int]]:
        yield from [(0, 4096), (8192, 4096)]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def remotes(monkeypatch: pytest.MonkeyPatch) -> list[FakeRemote]:
    """Those that were made since; no libnbd is needed."""
    module = types.ModuleType("fvd.device._remote")
    module.Remote = FakeRemote  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fvd.device._remote", module)
    monkeypatch.setattr(FakeRemote, "size_bytes", MIB)
    monkeypatch.setattr(FakeRemote, "made", [])
    monkeypatch.setattr(FakeRemote, "failures", [])
    return FakeRemote.made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What qemu-img says next ("json", or "error"), and the commands that it got ("commands")."""
    answer: dict[str, Any] = {"json": {}, "error": None, "commands": [], "options": []}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        answer["commands"].append(command)
        answer["options"].append(options)
        if isinstance(answer["error"], BaseException):
            raise answer["error"]
        if answer["error"]:
            return subprocess.CompletedProcess(command, 1, b"", answer["error"].encode())
        said = {"format": command[3].removeprefix("--format="), "virtual-size": MIB} | answer["json"]
        text = json.dumps(said).replace("as it was named", command[-1])
        return subprocess.CompletedProcess(command, 0, text.encode(), b"")

    played = types.SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(base_images, "subprocess", played)
    monkeypatch.setattr(base_images, "_program", lambda name, package="": f"/usr/bin/{name}")
    return answer


def test_without_libnbd_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what else may be wrong with a compiled module is not taken for that."""

    class Lacks:
        text = "libnbd.so.0: cannot open shared object file: No such file or directory"

        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            if name == "fvd.device._remote":
                raise ImportError(self.text)

    lacks = Lacks()
    monkeypatch.delitem(sys.modules, "fvd.device._remote", raising=False)
    monkeypatch.setattr(sys, "meta_path", [lacks, *sys.meta_path])
    with pytest.raises(Unsupported, match=r"nbd://host is read with libnbd; install it \(Debian: apt install libnbd0\)$"):
        examine_base("nbd://host")
    lacks.text = "libnbd.so.0: failed to map segment from shared object"
    with pytest.raises(ImportError):
        examine_base("nbd://host")


# --- Names ---------------------------------------------------------------------------------------------------------


def test_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(tmp_path / "base", MIB)
    monkeypatch.chdir(tmp_path)
    expected = BaseReference(f"{tmp_path}/base", MIB, BaseFormat.RAW)
    for name in ("base", "./base", tmp_path / "base", f"{tmp_path}/../{tmp_path.name}/base"):
        assert examine_base(name) == examine_base(name, "raw") == expected


def test_a_path_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(tmp_path / "json:{}", MIB)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument, match="json:"):
        examine_base("json:{}")
    for name in ("./json:{}", Path("json:{}")):
        assert examine_base(name).locator == f"{tmp_path}/json:{{}}"


@pytest.mark.parametrize(
    ("name", "base_format", "words"),
    [
        ("https://host/x", None, "needs its format"),
        ("rbd:a/b", None, "needs its format"),
        ("https://host/x", "nbd", "its format cannot be nbd"),
        ("nbd://host", "raw", "no format raw"),
        ("nbd://host", "qcow2", "no format qcow2"),
        ("foo://host", None, "reads no foo:"),
        ("json:{}", "raw", "reads no json:"),
        ("/path", "nbd", "needs a URI"),
        ("/path", "qcow", "choose one of raw, nbd, qcow2"),
        ("/path", "remote_raw", "choose one of"),
        ("/path", "none", "choose one of"),
        ("/pa\nth", None, "control character"),
        (b"/path", None, "must be text"),
    ],
)
def test_names_that_say_too_little_or_too_much(name: Any, base_format: str | None, words: str, remotes: list[FakeRemote]) -> None:
    with pytest.raises(InvalidArgument, match=words):
        examine_base(name, base_format)
    assert remotes == []


# --- Contents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MARKS)
def test_what_could_be_mistaken_needs_its_format(tmp_path: Path, kind: str, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = str(image(tmp_path / "image", kind))
    with pytest.raises(InvalidArgument, match=f"looks like {kind}: say which it is"):
        examine_base(path)
    assert examine_base(path, "raw") == BaseReference(path, MIB, BaseFormat.RAW)
    assert not remotes and not told["commands"]
    assert examine_base(path, kind) == BaseReference(path, MIB, BaseFormat[kind.upper()])
    other = "vdi" if kind != "vdi" else "qed"
    with pytest.raises(InvalidArgument, match=f"said to be {other}, but looks like {kind}"):
        examine_base(path, other)


def test_a_raw_image_that_is_said_to_be_another(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="said to be qcow2, but looks like raw"):
        examine_base(sparse(tmp_path / "image", MIB), "qcow2")
    with pytest.raises(InvalidArgument, match="looks like raw"):
        examine_base(sparse(tmp_path / "short", 3), "vdi")


def test_a_vhd_of_fixed_size_is_known_by_its_end(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = sparse(tmp_path / "image", MIB + 512)
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"conectix")
    with pytest.raises(InvalidArgument, match="looks like vpc"):
        examine_base(path)
    # Its first bytes are a guest's: they may look like anything, and mean nothing when the format is stated.
    with path.open("r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3" + b"\xff" * 8)
    with pytest.raises(InvalidArgument, match="looks like qcow2 and vpc"):
        examine_base(path)
    assert examine_base(path, "vpc").format is BaseFormat.VPC


@pytest.mark.parametrize("offset", [0, 524288])
def test_an_fvd_disk_is_no_base(tmp_path: Path, offset: int, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = sparse(tmp_path / "disk", MIB)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(MAGIC)
    for base_format in (None, "raw"):
        with pytest.raises(Unsupported, match="fvd disk; serve it"):
            examine_base(path, base_format)
    # Inside an image the same bytes are only contents.
    assert examine_base(image(tmp_path / "image", "qcow2", (524288, MAGIC)), "qcow2").format is BaseFormat.QCOW2


@pytest.mark.parametrize(
    ("kind", "offset", "field", "words"),
    [
        ("qcow2", 8, struct.pack(">Q", 512), "has a backing file"),
        ("qcow2", 72, struct.pack(">Q", 4), "keeps its data in another file"),
        ("qed", 16, struct.pack("<Q", 1), "has a backing file"),
        ("vmdk", 0, b"# Disk DescriptorFile", "keeps its data in other files"),
        ("vmdk", 12, bytes(8), "keeps its data in other files"),
        ("vpc", 60, struct.pack(">I", 4), "has a parent"),
        ("vdi", 76, struct.pack("<I", 4), "has a parent"),
        ("vdi", 424, b"\1", "has a parent"),
        ("vdi", 455, b"\1", "has a parent"),
    ],
)
def test_headers_that_name_other_files(
    tmp_path: Path, kind: str, offset: int, field: bytes, words: str, remotes: list[FakeRemote], told: dict[str, Any]
) -> None:
    """They are refused before any program of QEMU's opens the image; at examination and, should one come later, at opening."""
    path = image(tmp_path / "image", kind)
    reference = examine_base(path, kind)
    told["commands"].clear()
    remotes.clear()
    image(path, kind, (offset, field))
    with pytest.raises(Unsupported, match=words):
        examine_base(path, kind)
    with pytest.raises(Unsupported, match=words):
        open_base(reference, NOBODY)
    assert remotes == [] and told["commands"] == []


def test_a_parent_of_a_fixed_vhd(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = sparse(tmp_path / "image", MIB)
    path.write_bytes(bytes(MIB) + (b"conectix".ljust(60, b"\0") + struct.pack(">I", 4)).ljust(512, b"\0"))
    with pytest.raises(Unsupported, match="has a parent"):
        examine_base(path, "vpc")


@pytest.mark.parametrize("seed", range(20))
def test_tables_of_a_vhdx_that_hold_anything(tmp_path: Path, seed: int, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    """Places beyond its end, and tables full of rows: what else is wrong with it is qemu-img's to say."""
    rng = random.Random(seed)
    place = rng.choice((0, MIB - 1, MIB, 2**63, 2**64 - 1))
    row = vhdx.METADATA + struct.pack("<QII", place, 2**32 - 1, 1)
    path = image(tmp_path / "image", "vhdx", ((192 + 64 * rng.randrange(2)) << 10, rng.randbytes(16) + row * rng.choice((1, 2047))))
    assert examine_base(path, "vhdx").format is BaseFormat.VHDX


def test_a_header_that_is_cut_off(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"QFI\xfb\0")
    assert examine_base(path, "qcow2").format is BaseFormat.QCOW2  # what else is wrong with it is qemu-img's to say


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"backing-filename": "x"}, "has a backing file"),
        ({"full-backing-filename": "/x"}, "has a backing file"),
        ({"format-specific": {"type": "qcow2", "data": {"data-file": "/x"}}}, "keeps its data in another file"),
        ({"format-specific": {"type": "vmdk", "data": {"extents": [{"filename": "/other"}]}}}, "keeps its data in other files"),
        ({"encrypted": True}, "encrypted"),
        ({"format-specific": 5}, "a form that fvd does not know"),
        ({"format-specific": {"data": {"extents": [{}]}}}, "a form that fvd does not know"),
    ],
)
def test_what_qemu_img_tells_of_other_files(
    tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any], said: dict[str, Any], words: str
) -> None:
    path = image(tmp_path / "image", "qcow2")
    reference = BaseReference(str(path), MIB, BaseFormat.QCOW2)
    told["json"] = said
    for call in (lambda: examine_base(path, "qcow2"), lambda: open_base(reference, NOBODY), lambda: examine_base("ssh://host/x", "vhdx")):
        with pytest.raises(Unsupported, match=words):
            call()
    assert remotes == []


def test_an_image_of_one_extent(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = image(tmp_path / "image", "vmdk")
    told["json"] = {"format-specific": {"type": "vmdk", "data": {"extents": [{"filename": "as it was named"}]}}}
    assert examine_base(path, "vmdk").format is BaseFormat.VMDK


def test_a_format_that_qemu_contradicts(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    told["json"] = {"format": "raw"}
    with pytest.raises(Conflict, match="is raw, not qcow2"):
        examine_base(image(tmp_path / "image", "qcow2"), "qcow2")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("qemu-img: Could not open 'X': Failed to get shared \"write\" lock\nIs another process using the image [X]?", InUse),
        ("qemu-img: Could not open 'X': Could not open 'X': Permission denied", PermissionDenied),
        ("qemu: module block-block-ssh not found\nqemu-img: Could not open 'X': Unknown protocol 'ssh'", Unsupported),
        ("qemu-img: Could not open 'X': Could not open 'X': No such file or directory", NotFound),
        ("qemu-img: Could not open 'X': Image is not in qcow2 format", InvalidArgument),
        ("qemu-img: Could not open 'X': unsupported VDI image (non-NULL link UUID)", Unsupported),
        ("qemu-img: Could not open 'X': Failed to connect to host: Connection refused", DeviceError),
        ("", DeviceError),
        (subprocess.TimeoutExpired("qemu-img", 3), Timeout),
        (OSError(errno.ENOEXEC, "Exec format error"), DeviceError),
    ],
)
def test_what_qemu_img_complains_of(told: dict[str, Any], error: Any, kind: type[FvdError]) -> None:
    """A locator that contains the words of every error decides nothing."""
    locator = "ssh://host/permission-denied-lock-another-process-404-invalid-unknown-protocol"
    told["error"] = error.replace("X", locator) if isinstance(error, str) and error else error or "qemu-img: strange"
    with pytest.raises(kind, match="ssh://host") as caught:
        examine_base(locator, "raw", timeout_seconds=3)
    assert type(caught.value) is kind


# --- Programs ------------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = str(image(tmp_path / "im,age:'\"x", "qcow2"))
    examine_base(path, "qcow2", timeout_seconds=7)
    (remote,) = remotes
    handed = f"/proc/self/fd/{remote.inherited}"
    assert told["commands"] == [["/usr/bin/qemu-img", "info", "--output=json", "--format=qcow2", "--", handed]]
    options = told["options"][0]
    assert options["pass_fds"] == (remote.inherited,) and remote.inherited >= 64
    assert (
        options["timeout"] == 7 and options["env"]["LC_ALL"] == "C" and not options.get("shell") and options["stdin"] == subprocess.DEVNULL
    )
    command = remote.command
    assert command is not None and remote.timeout_seconds == 7 and remote.name == path
    words = ["/usr/bin/qemu-nbd", "--read-only", "--shared=1", "--cache=writeback", "--aio=threads"]
    assert command[:-1] == [*words, "--"]
    assert json.loads(command[-1].removeprefix("json:")) == {
        "driver": "qcow2",
        "read-only": True,
        "backing": None,
        "file": {"driver": "file", "filename": handed},
    }
    assert remote.opened and remote.closed
    for stated, driver in (("raw", "raw"), ("vhdx", "vhdx")):
        examine_base("https://host/x", stated)
        assert remotes[-1].command == [*words, f"--format={driver}", "--", "https://host/x"]


def test_an_image_on_a_device(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    with loop_device(image(tmp_path / "image", "qcow2")) as device:
        assert examine_base(device, "qcow2").locator == device
    command = remotes[0].command
    assert command is not None and json.loads(command[-1].removeprefix("json:"))["file"]["driver"] == "host_device"


@pytest.mark.parametrize("program", ["qemu-img", "qemu-nbd"])
def test_a_program_that_is_missing(tmp_path: Path, program: str, remotes: list[FakeRemote], monkeypatch: pytest.MonkeyPatch) -> None:
    real = base_images.shutil.which
    monkeypatch.setattr(
        base_images.shutil, "which", lambda name, **options: None if name == program else real(name, **options) or "/bin/true"
    )
    monkeypatch.setattr(base_images, "_run", lambda words, *_: json.dumps({"format": words[3].partition("=")[2]}).encode())
    with pytest.raises(Unsupported, match=f"{program} is not installed.*apt install qemu-utils"):
        examine_base(image(tmp_path / "image", "qcow2"), "qcow2")
    with pytest.raises(Unsupported, match="apt install qemu-utils"):
        examine_base("ssh://host/x", "vhdx")


def test_programs_are_not_looked_for_in_the_users_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qemu-img").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with suppress(Unsupported):  # there may be none elsewhere
        assert base_images._program("qemu-img") != str(tmp_path / "qemu-img")


# --- Remote bases ----------------------------------------------------------------------------------------------------


def test_an_nbd_base(remotes: list[FakeRemote]) -> None:
    for base_format in (None, "nbd"):
        assert examine_base(NBD, base_format, timeout_seconds=3) == BaseReference(NBD, MIB, BaseFormat.NBD)
    assert [(remote.uri, remote.command, remote.timeout_seconds, remote.name) for remote in remotes] == [(NBD, None, 3, NBD)] * 2
    assert all(remote.opened and remote.closed for remote in remotes)


@pytest.mark.parametrize("locator", [NBD, "https://host/x"])
def test_a_remote_base_is_opened(remotes: list[FakeRemote], told: dict[str, Any], locator: str) -> None:
    reference = BaseReference(locator, MIB, BaseFormat.NBD if locator == NBD else BaseFormat.REMOTE_RAW)
    with open_base(reference, NOBODY, 5) as base:
        assert base.node is None and base.fd == -1 and base.remote is remotes[0]  # type: ignore[comparison-overlap]
        assert base.size_bytes() == MIB and remotes[0].opened and not remotes[0].closed and remotes[0].timeout_seconds == 5
        assert list(base.zero_extents()) == [(0, 4096), (8192, 4096)]
    assert remotes[0].closed


def test_a_remote_base_that_is_empty_or_has_changed(remotes: list[FakeRemote], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRemote, "size_bytes", 0)
    with pytest.raises(InvalidArgument, match="empty"):
        examine_base(NBD)
    with pytest.raises(Conflict, match=f"has 0 bytes, but had {MIB}"):
        open_base(BaseReference(NBD, MIB, BaseFormat.NBD), NOBODY)
    assert len(remotes) == 2 and all(remote.closed for remote in remotes)


def test_a_server_that_is_not_there(remotes: list[FakeRemote]) -> None:
    FakeRemote.failures[:] = [NotFound("no server"), Timeout("silence"), DeviceError("reset")]
    with pytest.raises(NotFound, match="the disk's base is missing: no server"):
        open_base(BaseReference(NBD, MIB, BaseFormat.NBD), NOBODY)
    for kind in (Timeout, DeviceError):
        with pytest.raises(kind):
            examine_base(NBD)
    assert len(remotes) == 3 and all(remote.closed and not remote.opened for remote in remotes)


# --- Claims ----------------------------------------------------------------------------------------------------------


def test_an_image_in_use_is_claimed(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = image(tmp_path / "image", "qcow2")
    reference = examine_base(path, "qcow2")
    with open_base(reference, NOBODY), open_base(reference, NOBODY), claim(path, Ownership.READER), pytest.raises(InUse):
        claim(path, Ownership.WRITER)
    with claim(path, Ownership.WRITER):
        for call in (lambda: open_base(reference, NOBODY), lambda: examine_base(path, "qcow2"), lambda: examine_base(path)):
            with pytest.raises(InUse):
                call()


def test_a_program_that_does_not_start_leaves_nothing_open(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    reference = BaseReference(str(image(tmp_path / "image", "qcow2")), MIB, BaseFormat.QCOW2)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    FakeRemote.failures[:] = [DeviceError("reset")]
    with pytest.raises(DeviceError):
        open_base(reference, NOBODY)
    told["error"] = 'Failed to get "consistent read" lock: another process'
    with pytest.raises(InUse):
        open_base(reference, NOBODY)
    assert len(remotes) == 1 and len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_what_was_judged_is_what_is_read_at_each_start(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    """Another file under the name changes nothing; what was written into the one that is open ends its use."""
    path = image(tmp_path / "image", "qcow2")
    with open_base(BaseReference(str(path), MIB, BaseFormat.QCOW2), NOBODY):
        (remote,) = remotes
        assert remote.prepare is not None and remote.prepare() == remote.command
        path.rename(tmp_path / "away")
        image(path, "qcow2", (72, struct.pack(">Q", 4)))
        assert remote.prepare() == remote.command
        assert os.fstat(remote.inherited).st_ino == (tmp_path / "away").stat().st_ino
        (tmp_path / "away").touch()
        with pytest.raises(Conflict, match="has been changed since it was opened"):
            remote.prepare()
        image(tmp_path / "away", "qcow2", (72, struct.pack(">Q", 4)))
        with pytest.raises(FvdError, match=r"has been changed|keeps its data"):
            remote.prepare()
    assert remote.closed


def test_a_base_that_leads_to_the_disk_itself(tmp_path: Path, remotes: list[FakeRemote], told: dict[str, Any]) -> None:
    path = image(tmp_path / "image", "qcow2")
    status = path.stat()
    itself: Identity = ("file", status.st_dev, status.st_ino)
    for base_format in ("qcow2", "raw"):
        with pytest.raises(InvalidArgument, match="its own base"):
            examine_base(path, base_format, itself)
        with pytest.raises(Conflict, match="the disk itself"):
            open_base(BaseReference(str(path), MIB, BaseFormat[base_format.upper()]), itself)


def test_a_raw_base(tmp_path: Path) -> None:
    path = sparse(tmp_path / "image", MIB)
    with open_base(examine_base(path), NOBODY) as base:
        assert base.remote is None and base.node is not None and base.fd == base.node.fd >= 0
        assert list(base.zero_extents()) == [(0, MIB)] and base.size_bytes() == MIB
        with pytest.raises(InUse):
            claim(path, Ownership.WRITER)
    assert base.fd == -1
    base.close()
    claim(path, Ownership.WRITER).close()
