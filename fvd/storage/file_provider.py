# SPDX-License-Identifier: Apache-2.0
"""Sparse files that play the logical volume: made beside their place, linked to it when whole. One implementation of `interfaces.Provider`.

The folder may be somebody else's, who can put anything under any name in it meanwhile: everything goes through `folders.Place`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from functools import partial

from fvd.device import names
from fvd.device.claim import Claim, claim
from fvd.device.folders import Place, reach
from fvd.device.node import Identity, create_file, identity_of, open_node, typed_errors
from fvd.digest import sha256
from fvd.errors import Conflict, FvdError, InUse, InvalidArgument, NotFound
from fvd.storage.interfaces import AttachedPath, Contents, Plan, Presence, Wipe
from fvd.storage.sized import FileStorage
from fvd.units import format_size
from fvd.volume.name import VolumeName

_NAME_BYTES_MAX = 255


class FileProvider:
    """Sparse files. One is built under a hidden name beside its place and linked to it when it is whole."""

    fixed_size = False
    in_place = False

    def presence(self, name: VolumeName) -> Presence:
        return Presence.PRESENT if names.exists(name.path) else Presence.ABSENT

    def attach(self, name: VolumeName, *, looking: bool = False) -> AttachedPath:
        if names.leads_to_device(name.path):
            raise InvalidArgument(f"{name} is a block device; name it {name.path}")
        return AttachedPath(name.path, FileStorage, retire=partial(_delete, name))

    def build(self, name: VolumeName, plan: Plan) -> _File:
        return _File(name, plan.size_bytes)

    def forget_unfinished(self, name: VolumeName, wipe: Wipe | None = None) -> None:
        with contextlib.suppress(FvdError, OSError), reach(name.path) as place:
            place.check_folder()
            _clear(place, _hidden_name(place.name))


class _File:
    contents = Contents.BLANK

    def __init__(self, name: VolumeName, size_bytes: int) -> None:
        self._name = name
        self._published = False
        try:
            # A symbolic link to a volume is the user's own: the file behind it is what is built or replaced.
            with typed_errors("reaching", name.path):
                self._place = reach(name.path)
        except NotFound as error:
            raise NotFound(f"the directory of {name} does not exist; make it first") from error
        try:
            self._place.check_folder()
            self._hidden = _hidden_name(self._place.name)
            self._claim = _create_claimed(self._place, self._hidden, size_bytes, name)
            try:
                self.node = open_node(name.path, sharing=self._claim.descriptor)
                self._claim.check_covers(self.node)
            except BaseException:
                self._remove_hidden()
                self._claim.close()
                raise
        except BaseException:
            self._place.close()
            raise

    def ensure_size(self, size_bytes: int) -> None:
        pass

    def publish(self, *, replace: bool) -> None:
        try:
            with typed_errors("naming", self._name.path):
                if replace:
                    # What has the name now is claimed, so that a disk in use is never pulled away from under its user.
                    with _claim_here(self._place, self._place.name):
                        self._place.rename(self._claim.descriptor, self._hidden)
                else:
                    try:
                        self._place.link(self._claim.descriptor, self._hidden)
                    except FileExistsError as error:
                        raise Conflict(f"{self._name} was made by somebody else meanwhile; run the command again to compare") from error
                    self._place.remove(self._hidden, only=self._claim.descriptor)
                self._place.sync()
        except NotFound as error:
            raise Conflict(f"{self._name}: what was made was taken away by somebody else meanwhile; run the command again") from error
        self._published = True

    def close(self) -> None:
        if not self._published:
            self._remove_hidden()
        self.node.close()
        self._claim.close()
        self._place.close()

    def _remove_hidden(self) -> None:
        with contextlib.suppress(FvdError, OSError):
            self._place.remove(self._hidden, only=self._claim.descriptor)


def _create_claimed(place: Place, hidden: str, size_bytes: int, name: VolumeName) -> Claim:
    """Makes the hidden file and claims it; a stale one of an interrupted build is replaced. Raises InUse if a build is at work."""
    for _ in range(8):  # each round is lost only to another build of the same volume
        _clear(place, hidden)
        try:
            fd = create_file(place, hidden, size_bytes)
        except FileExistsError:
            continue
        except NotFound as error:
            raise NotFound(f"the directory of {name} does not exist; make it first") from error
        except FvdError as error:
            raise type(error)(f"{name} cannot be made with {format_size(size_bytes)}: {error}") from error
        try:
            held = claim(name.path, opened=fd)
        except (InUse, NotFound):
            continue
        finally:
            os.close(fd)
        # Between the creation and the claim another build may have taken ours for stale.
        if _identity(place, hidden) == held.identity:
            return held
        held.close()
    raise InUse(f"{name} is being provisioned by another process; wait for it and run the command again")


def _clear(place: Place, hidden: str) -> None:
    """Removes a hidden file that nobody is at work on. Raises InUse if somebody is, Conflict if it is none of ours."""
    with typed_errors("removing what is left of", place.path):
        status = place.status(hidden)
        if status is None:
            return
        if not stat.S_ISREG(status.st_mode):
            raise Conflict(f"{place.path}: {hidden} beside it is in the way and is no file that fvd has left; move it away")
        if identity_of(status) == _identity(place, place.name):
            place.remove(hidden, only=status)  # the second name of a finished disk: the crash came between link and unlink
            return
        with contextlib.suppress(NotFound), _claim_here(place, hidden) as held:
            if _identity(place, hidden) == held.identity:
                place.remove(hidden, only=held.descriptor)


def _claim_here(place: Place, name: str) -> Claim:
    """Claims the file of this name, which is no link."""
    fd = place.open_file(os.O_RDWR, name)
    try:
        return claim(place.path, opened=fd)
    finally:
        os.close(fd)


def _delete(name: VolumeName, identity: Identity) -> None:
    """The file with this identity, which is claimed, loses its name. Raises Conflict if another has it by now."""
    with typed_errors("removing", name.path), reach(name.path) as place:
        place.check_folder()
        status = place.status()
        if status is None:
            return
        if identity_of(status) != identity or not place.remove(only=status):
            raise Conflict(f"{name} was replaced by something else meanwhile, which is left alone; the disk that was there is no more")


def _identity(place: Place, name: str) -> Identity | None:
    status = place.status(name)
    return None if status is None else identity_of(status)


def _hidden_name(name: str) -> str:
    hidden = f".{name}.fvd-provision"
    if len(os.fsencode(hidden)) > _NAME_BYTES_MAX:
        return f".{sha256(os.fsencode(name)).hex()}.fvd-provision"
    return hidden
