# SPDX-License-Identifier: Apache-2.0
"""Notices that a control socket appears, by inotify on the folders where they live: nothing is polled.

A folder that is not there yet is waited for in its parent. Knows the folders, not what is said at the sockets.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fvd._lifetime import keep
from fvd.control import inotify
from fvd.control.paths import SUFFIX, search_dirs
from fvd.errors import DeviceError, Unsupported

# Sockets are moved into place; folders are made.
_MASK = inotify.MOVED_TO | inotify.CREATE | inotify.ONLYDIR


class SocketWatch:
    """``fd`` is readable when something has changed; ``changed`` then tells. Not safe from threads."""

    def __init__(self) -> None:
        """Raises Unsupported: this user may have no more inotify instances."""
        try:
            self._inotify = inotify.Inotify()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise Unsupported(
                    f"cannot watch for disks that begin to be served ({error.strerror}); raise fs.inotify.max_user_instances or the "
                    "limit on open files"
                ) from None
            raise DeviceError(f"cannot watch for disks that begin to be served: {error.strerror}") from error
        keep(self, lambda watch: (watch.fd,))
        self._folders: dict[int, Path] = {}  # by watch descriptor
        self.refresh()

    @property
    def fd(self) -> int:
        return self._inotify.fd

    def refresh(self) -> None:
        """Watch what there is to watch now. To be called before looking for sockets, so that none slips through."""
        for folder in _to_watch():
            try:
                self._folders[self._inotify.add_watch(folder, _MASK)] = folder
            except OSError:
                continue  # gone again, or not ours to look at: then there is nothing in it that we could connect to

    def changed(self) -> set[Path]:
        """What has appeared since the last time: sockets, and folders that may hold some."""
        folders = set()
        for event in self._inotify.read():
            if event.mask & inotify.Q_OVERFLOW:
                folders |= set(self._folders.values())
            elif event.mask & inotify.IGNORED:
                folder = self._folders.pop(event.watch, None)  # removed; its parent may be all there is to watch now
                if folder is not None:
                    folders.add(folder)
            elif (folder := self._folders.get(event.watch)) is not None and _matters(folder / event.name, event.mask):
                folders.add(folder / event.name)
        return folders

    def close(self) -> None:
        self._inotify.close()


def _to_watch() -> set[Path]:
    """The folders of sockets, and where one that is not there yet will appear."""
    folders = set()
    for folder in search_dirs():
        existing = folder
        while not existing.is_dir() and existing != existing.parent:
            existing = existing.parent
        folders.add(existing)
    if os.getuid() == 0 and not os.environ.get("FVD_RUNTIME_DIR"):  # root sees every user's: search_dirs
        folders |= {Path("/run/user"), Path("/tmp"), *Path("/run/user").glob("*")}
    return folders


def _matters(path: Path, mask: int) -> bool:
    """/tmp and /run are busy places: only what can be, or lead to, a control socket counts."""
    if path.suffix == SUFFIX:
        return True
    if not mask & inotify.ISDIR:
        return False
    if path.parent == Path("/run/user") or path.name == "fvd":
        return True
    return any(folder == path or path in folder.parents for folder in search_dirs())
