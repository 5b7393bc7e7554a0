"""Sparse files that play the logical volume: made beside their place, linked to it when whole. One implementation of `seams.Provider`."""

from __future__ import annotations

import contextlib
import hashlib
import os

from fvd.device import names
from fvd.device.claim import Claim, Ownership, claim
from fvd.device.node import create_file, open_node
from fvd.errors import Conflict, FvdError, InUse, InvalidArgument, NotFound
from fvd.units import format_size
from fvd.volume.growth import FileStorage
from fvd.volume.name import VolumeName
from fvd.volume.seams import AttachedPath, Contents, Plan, Presence

_NAME_LIMIT_BYTES = 255


class FileProvider:
    """Sparse files. One is built under a hidden name beside its place and linked to it when it is whole."""

    fixed_size = False
    in_place = False

    def presence(self, name: VolumeName) -> Presence:
        return Presence.PRESENT if names.exists(name.path) else Presence.ABSENT

    def attach(self, name: VolumeName, *, looking: bool = False) -> AttachedPath:
        if names.leads_to_device(name.path):
            raise InvalidArgument(f"{name} is a block device; name it {name.path}")
        return AttachedPath(name.path, FileStorage, retire=lambda: names.remove(names.follow(name.path)))

    def build(self, name: VolumeName, plan: Plan) -> _File:
        return _File(name, plan.size_bytes)

    def forget_unfinished(self, name: VolumeName) -> None:
        with contextlib.suppress(FvdError):
            target = names.follow(name.path)
            _clear(_hidden_path(target), target)


class _File:
    contents = Contents.BLANK

    def __init__(self, name: VolumeName, size_bytes: int) -> None:
        self._name = name
        # A symbolic link to a volume is the user's own: the file behind it is what is built or replaced.
        self._target = names.follow(name.path)
        self._path = _hidden_path(self._target)
        self._published = False
        self._claim = _create_claimed(self._path, self._target, size_bytes, name)
        try:
            self.node = open_node(self._path, sharing=self._claim.descriptor)
            self._claim.check_covers(self.node)
        except BaseException:
            names.remove(self._path)
            self._claim.close()
            raise

    def make_room(self, size_bytes: int) -> None:
        pass

    def publish(self, *, replace: bool) -> None:
        try:
            if replace:
                # What has the name now is claimed, so that a disk in use is never pulled away from under its user.
                with claim(self._target, Ownership.WRITER):
                    names.replace(self._path, self._target)
            else:
                names.publish(self._path, self._target)
        except FileExistsError as error:
            raise Conflict(f"{self._name} was made by somebody else meanwhile; run the command again to compare") from error
        self._published = True

    def close(self) -> None:
        if not self._published:
            with contextlib.suppress(FvdError):
                names.remove(self._path)
        self.node.close()
        self._claim.close()


def _create_claimed(path: str, target: str, size_bytes: int, name: VolumeName) -> Claim:
    """Makes the hidden file and claims it; a stale one of an interrupted build is replaced. Raises InUse if a build is at work."""
    for _ in range(8):  # each round is lost only to another build of the same volume
        _clear(path, target)
        try:
            create_file(path, size_bytes)
        except FileExistsError:
            continue
        except NotFound as error:
            raise NotFound(f"the directory of {name} does not exist; make it first") from error
        except FvdError as error:
            raise type(error)(f"{name} cannot be made with {format_size(size_bytes)}: {error}") from error
        try:
            held = claim(path, Ownership.WRITER)
        except (InUse, NotFound):
            continue
        # Between the creation and the claim another build may have taken ours for stale.
        if names.identity(path) == held.identity:
            return held
        held.close()
    raise InUse(f"{name} is being provisioned by another process; wait for it and run the command again")


def _clear(path: str, target: str) -> None:
    """Removes a hidden file that nobody is at work on. Raises InUse if somebody is."""
    found = names.identity(path)
    if found is None:
        return
    if found == names.identity(target):
        names.remove(path)  # the second name of a finished disk: the crash came between link and unlink
        return
    with contextlib.suppress(NotFound), claim(path, Ownership.WRITER) as held:
        if names.identity(path) == held.identity:
            names.remove(path)


def _hidden_path(target: str) -> str:
    folder, _, name = target.rpartition("/")
    hidden = f".{name}.fvd-provision"
    if len(os.fsencode(hidden)) > _NAME_LIMIT_BYTES:
        hidden = f".{hashlib.sha256(os.fsencode(name)).hexdigest()}.fvd-provision"
    return f"{folder}/{hidden}"
