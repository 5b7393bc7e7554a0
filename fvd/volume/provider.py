"""The seam to the places that hold disks: what happens to a volume's *name* (made, opened, released, removed). Knows nothing of contents.

Two implementations now, files and fixed devices; LVM is the third. `fvd.volume.growth` is the other half: the size of open storage.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import Protocol

from fvd.device import names
from fvd.device.claim import Claim, Ownership, claim
from fvd.device.node import Node, create_file, open_node
from fvd.errors import Conflict, FvdError, InUse, InvalidArgument, NotFound
from fvd.units import format_size
from fvd.volume.growth import FileStorage, FixedStorage, Storage
from fvd.volume.name import VolumeKind, VolumeName

_NAME_LIMIT_BYTES = 255


class Building(Protocol):
    """A place in the making: claimed, of the size asked for, and not yet under its name if the provider can hide it."""

    node: Node
    blank: bool  # every byte of it is known to be zero

    def publish(self, *, replace: bool) -> None:
        """Puts it under its name, durably. `replace`: whatever has the name is given up for it. Raises Conflict."""

    def close(self) -> None:
        """Lets go of it; if it was never published, removes what was built."""


class Provider(Protocol):
    """Where volumes of one kind live. Stateless: safe from threads."""

    fixed_size: bool  # the size of a volume is somebody else's business

    def exists(self, name: VolumeName) -> bool:
        """Whether something has this name, be it a disk or not."""

    def attach(self, name: VolumeName) -> str:
        """Makes the volume reachable (LVM: activates it) and returns the path to open. Raises NotFound."""

    def detach(self, name: VolumeName) -> None:
        """Undoes `attach`, when everything is closed. Never raises for what is detached already."""

    def build(self, name: VolumeName, size_bytes: int) -> Building:
        """Begins a volume of at least `size_bytes`. What an interrupted build left behind is replaced. Raises InUse, NoSpace, NotFound."""

    def storage(self, name: VolumeName, node: Node) -> Storage:
        """The growing end of an open volume."""

    def remove(self, name: VolumeName) -> None:
        """Gives the place back. The disk in it has been wiped, and the caller holds its claim. Absent is fine."""

    def forget_unfinished(self, name: VolumeName) -> None:
        """Removes what an interrupted `build` left behind, unless somebody is at work on it."""


def provider_for(name: VolumeName) -> Provider:
    """The provider of a kind of name."""
    return FileProvider() if name.kind is VolumeKind.FILE else DeviceProvider()


class DeviceProvider:
    """Block devices of fixed size: they are there or not, and nothing but their contents is ours."""

    fixed_size = True

    def exists(self, name: VolumeName) -> bool:
        return names.exists(name.path)

    def attach(self, name: VolumeName) -> str:
        if names.leads_to_file(name.path):
            raise InvalidArgument(f"{name} is a regular file; name it file:{name.path}")
        return name.path

    def detach(self, name: VolumeName) -> None:
        pass

    def build(self, name: VolumeName, size_bytes: int) -> Building:
        return _Device(name.path)

    def storage(self, name: VolumeName, node: Node) -> Storage:
        return FixedStorage(node)

    def remove(self, name: VolumeName) -> None:
        pass

    def forget_unfinished(self, name: VolumeName) -> None:
        pass


class _Device:
    blank = False

    def __init__(self, path: str) -> None:
        self._claim = claim(path, Ownership.WRITER)
        try:
            self.node = open_node(path)
            self._claim.check_covers(self.node)
        except BaseException:
            self._claim.close()
            raise

    def publish(self, *, replace: bool) -> None:
        pass

    def close(self) -> None:
        self.node.close()
        self._claim.close()


class FileProvider:
    """Sparse files. One is built under a hidden name beside its place and linked to it when it is whole."""

    fixed_size = False

    def exists(self, name: VolumeName) -> bool:
        return names.exists(name.path)

    def attach(self, name: VolumeName) -> str:
        if names.leads_to_device(name.path):
            raise InvalidArgument(f"{name} is a block device; name it {name.path}")
        return name.path

    def detach(self, name: VolumeName) -> None:
        pass

    def build(self, name: VolumeName, size_bytes: int) -> Building:
        return _File(name, size_bytes)

    def storage(self, name: VolumeName, node: Node) -> Storage:
        return FileStorage(node)

    def remove(self, name: VolumeName) -> None:
        names.remove(names.follow(name.path))

    def forget_unfinished(self, name: VolumeName) -> None:
        with contextlib.suppress(FvdError):
            target = names.follow(name.path)
            _clear(_hidden_path(target), target)


class _File:
    blank = True

    def __init__(self, name: VolumeName, size_bytes: int) -> None:
        self._name = name
        # A symbolic link to a volume is the user's own: the file behind it is what is built or replaced.
        self._target = names.follow(name.path)
        self._path = _hidden_path(self._target)
        self._published = False
        self._claim = _create_claimed(self._path, self._target, size_bytes, name)
        try:
            self.node = open_node(self._path)
            self._claim.check_covers(self.node)
        except BaseException:
            names.remove(self._path)
            self._claim.close()
            raise

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
