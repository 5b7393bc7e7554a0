# SPDX-License-Identifier: Apache-2.0
"""Root works in a folder of somebody else's, who swaps what lies there just before each step: nothing else of root's is touched.

The swaps are made by an audit hook of Python's, so before every system call by which a file is opened, made, renamed or removed, one after
the other: no race has to be won. What he makes is his own, as the kernel would have it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loops import mounted

from disks import MIB, driven, make, volume
from fvd.base import profile
from fvd.device import surviving
from fvd.device.folders import open_path, reach
from fvd.disk.extending import extend
from fvd.disk.removing import remove
from fvd.errors import FvdError, PermissionDenied, Unsupported

STRANGER = 65534
EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod", "os.truncate", "os.symlink"}
# What lies in his folder, by whatever path, and that folder: not what is opened on the way there, and below /proc and /sys.
NAMES = re.compile(r"(/.*/)?(\.?vm\.img.*|gold\..*|\.|his)|/proc/self/fd/.*")
Swap = Callable[[], None]

pytestmark = [pytest.mark.pure, pytest.mark.skipif(os.geteuid() != 0, reason="root is who is led astray")]


class Hook:
    """Python forgets no audit hook: there is one, which does nothing while nobody has set `swap`."""

    def __init__(self) -> None:
        self.swap: Swap | None = None
        self.left = -1  # steps until then
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.swap is None or event not in EVENTS or not NAMES.fullmatch(str(arguments[0])):
            return
        if self.left == 0:
            swap, self.swap = self.swap, None
            swap()
        self.left -= 1


_hooks: list[Hook] = []


@pytest.fixture
def hook() -> Iterator[Hook]:
    if not _hooks:
        _hooks.append(Hook())
    yield _hooks[0]
    _hooks[0].swap = None


class Scene:
    """His folder, with a disk of root's in it, and one that he has no business with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.his, self.secret = folder / "his", folder / "secret"
        self.disk = self.his / "vm.img"
        self.profile = self.his / "gold.fvd-profile"
        self.secret.mkdir(0o700)
        self.victim = self.secret / "vm.img"
        make(self.victim)
        (self.secret / "plain").write_text("nobody's business")
        profile.save(str(self.secret / "gold.fvd-profile"), MIB, [(0, 4096)])
        shutil.copy(self.victim, self.secret / ".vm.img.fvd-provision")
        self.before = self.seen()

    def make_his(self) -> None:
        """His folder as it is before each play."""
        for name in ("his", "old"):
            path = self.folder / name
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        self.his.mkdir()
        self.his.chmod(0o755)
        os.chown(self.his, STRANGER, STRANGER)
        make(self.disk)

    def seen(self) -> dict[str, tuple[Any, ...]]:
        """Everything in the secret folder, and it: contents, owners, modes, times."""
        found = {}
        for path in (self.secret, *sorted(self.secret.iterdir())):
            status = path.lstat()
            what = hash(path.read_bytes()) if path.is_file() else 0
            found[path.name] = (status.st_ino, status.st_mode, status.st_uid, status.st_nlink, status.st_size, status.st_mtime_ns, what)
        return found

    def plant(self, name: Path, target: Path) -> None:
        """His link, in place of what has the name."""
        fresh = self.his / "fresh"
        fresh.symlink_to(target)
        os.chown(fresh, STRANGER, STRANGER, follow_symlinks=False)
        fresh.replace(name)

    def swap_folder(self) -> None:
        """All of his folder becomes a link to the other."""
        self.his.rename(self.his.with_name("old"))
        self.his.symlink_to(self.secret)
        os.chown(self.his, STRANGER, STRANGER, follow_symlinks=False)


def provision(scene: Scene) -> None:
    make(scene.disk, force=True)


def delete(scene: Scene) -> None:
    remove(volume(scene.disk))


def write(scene: Scene) -> None:
    with driven(scene.disk) as driver:
        driver.pwrite(0, b"A" * 4096)
    extend(volume(scene.disk))


def record(scene: Scene) -> None:
    profile.save(str(scene.profile), MIB, [(4096, 4096)])


def swaps(scene: Scene) -> dict[str, Swap]:
    def half_made() -> None:
        for path in scene.his.glob("*.new-*"):
            scene.plant(path, scene.secret / "plain")

    return {
        "the disk": lambda: scene.plant(scene.disk, scene.victim),
        "a disk that is not there": lambda: scene.plant(scene.disk, scene.secret / "new.img"),
        "what is half made": lambda: scene.plant(scene.his / ".vm.img.fvd-provision", scene.victim),
        "a profile": lambda: scene.plant(scene.profile, scene.secret / "gold.fvd-profile"),
        "a profile that is not there": lambda: scene.plant(scene.profile, scene.secret / "new.fvd-profile"),
        "a half-made profile": half_made,
        "the folder": scene.swap_folder,
    }


def absent(scene: Scene) -> None:
    scene.disk.unlink()


def other_contents(scene: Scene) -> None:
    scene.disk.write_bytes(b"x" * 4096)


def as_it_is(scene: Scene) -> None:
    pass


VERBS = [
    (provision, absent, ("the disk", "a disk that is not there", "what is half made", "the folder")),
    (provision, other_contents, ("the disk", "what is half made", "the folder")),
    (delete, as_it_is, ("the disk", "a disk that is not there", "what is half made", "the folder")),
    (write, as_it_is, ("the disk", "the folder")),
    (record, as_it_is, ("a profile", "a profile that is not there", "a half-made profile", "the folder")),
]


@pytest.mark.parametrize(("verb", "prepare", "what"), [(verb, prepare, what) for verb, prepare, names in VERBS for what in names])
def test_a_swap_before_every_step(
    tmp_path: Path, hook: Hook, verb: Callable[[Scene], None], prepare: Callable[[Scene], None], what: str
) -> None:
    scene, step, last = Scene(tmp_path), -1, False
    while not last:
        scene.make_his()
        prepare(scene)
        swap = swaps(scene)[what]
        if step < 0:
            swap()  # planted long before
        else:
            hook.left, hook.swap = step, swap
        with contextlib.suppress(FvdError, FileNotFoundError):  # refused, or met what he made of it
            verb(scene)
        last = step >= 0 and hook.swap is not None
        hook.swap = None
        assert scene.seen() == scene.before, f"{verb.__name__}, {what}, before step {step}"
        step += 1
    assert step > 3


def test_where_a_strangers_link_may_lead(tmp_path: Path) -> None:
    """To what is his own, which he could have put there himself. Root's own links, and those of /proc, lead anywhere."""
    scene = Scene(tmp_path)
    scene.make_his()
    his_file, link = scene.his / "file", scene.his / "link"
    his_file.write_text("his")
    os.chown(his_file, STRANGER, STRANGER)
    scene.plant(link, his_file)
    os.close(open_path(link, os.O_RDWR))
    scene.plant(scene.his / "again", link)
    os.close(open_path(scene.his / "again", os.O_RDWR))
    scene.plant(scene.his / "here", Path())
    os.close(open_path(scene.his / "here" / "here" / "link", os.O_RDWR))
    for target in (scene.victim, Path("../secret/vm.img"), scene.disk, Path("/dev/null")):
        scene.plant(link, target)
        for path in (link, scene.his / "again"):
            with pytest.raises(PermissionDenied, match=f"made by user {STRANGER}"):
                open_path(path, os.O_RDWR)
    scene.plant(scene.his / "there", scene.secret)
    with pytest.raises(PermissionDenied):
        open_path(scene.his / "there" / "vm.img", os.O_RDONLY)
    for name in ("new", "there/new"):
        scene.plant(link, scene.secret / "new")
        with pytest.raises(PermissionDenied), reach(scene.his / name if "/" in name else link) as place:
            place.check_folder()
    ours = tmp_path / "ours"
    ours.symlink_to(scene.secret)
    fd = open_path(ours / "vm.img", os.O_RDWR)
    os.close(open_path(f"/proc/self/fd/{fd}", os.O_RDWR))
    os.close(fd)
    scene.plant(link, link)
    with pytest.raises(OSError, match="Too many levels"):
        open_path(link, os.O_RDONLY)
    os.mkfifo(scene.his / "pipe")
    os.close(open_path(scene.his / "pipe", os.O_RDONLY))  # and does not wait for its other end


def test_memory_that_outlives_is_made_in_no_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted("tmpfs", tmp_path / "shm", "-t", "tmpfs", "-o", "mode=1777") as shm:
        folder = shm / "fvd-0"
        monkeypatch.setenv("FVD_PENDING_DIR", str(folder / "pending"))
        folder.mkdir()
        os.chown(folder, STRANGER, STRANGER)
        with pytest.raises(Unsupported, match="folder of its owner's"):
            surviving.make("a.1", 4096)
        assert list(folder.iterdir()) == []
        folder.rmdir()
        (shm / "target").mkdir()
        folder.symlink_to(shm / "target")
        os.chown(folder, STRANGER, STRANGER, follow_symlinks=False)
        with pytest.raises(Unsupported):
            surviving.make("a.1", 4096)
        assert list((shm / "target").iterdir()) == []
