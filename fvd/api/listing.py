"""Which disks are there: served ones by their control sockets, closed ones in the folders that one names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fvd.api.types import Info, Listed, info_from_json
from fvd.errors import FvdError, InvalidArgument, NotFound, PermissionDenied

if TYPE_CHECKING:
    from fvd.volume.name import VolumeName

# Someone who does not answer is left out rather than waited for.
ANSWER_TIMEOUT_SECONDS = 5.0


def list_volumes(*folders: str) -> list[Listed]:
    """The disks that are served (those of this user; root's list has everyone's), then the others in each folder, not below it.

    Files and block devices are looked at; what is no fvd disk is left out, damaged disks are not. Raises NotFound (no such folder).
    """
    found = _served()
    seen = {listed.volume for listed in found}
    for folder in folders:
        for name in _candidates(folder):
            if str(name) not in seen:
                seen.add(str(name))
                listed = _look(name)
                if listed is not None:
                    found.append(listed)
    return found


def _served() -> list[Listed]:
    from fvd.control.client import ControlClient
    from fvd.control.paths import all_sockets
    from fvd.control.protocol import ServerGone

    found = []
    for path in all_sockets():
        try:
            with ControlClient(path, timeout_seconds=ANSWER_TIMEOUT_SECONDS) as client:
                served = info_from_json(client.ask("info"))
            found.append(Listed(served.volume, "served", served))
        except ServerGone:
            continue  # its process has died; the next one replaces it
        except FvdError as error:
            found.append(Listed(f"(control socket {path})", error.kind, None, str(error)))
    return sorted(found, key=lambda listed: listed.volume)


def _candidates(folder: str) -> list[VolumeName]:
    """The files and block devices of a folder that begin like an fvd disk, in order."""
    from fvd.device.node import open_node
    from fvd.volume.name import VolumeKind, VolumeName
    from fvd.volume.superblocks import has_magic

    path = Path(folder)
    try:
        entries = sorted(entry for entry in path.iterdir() if entry.is_file() or entry.is_block_device())
    except FileNotFoundError:
        raise NotFound(f"{folder} does not exist; name a folder") from None
    except NotADirectoryError:
        raise InvalidArgument(f"{folder} is no folder; fvd-lv info shows a single volume") from None
    except PermissionError:
        raise PermissionDenied(f"{folder} may not be read by you") from None
    names = []
    for entry in entries:
        try:
            with open_node(entry, read_only=True, direct=False) as node:
                if not has_magic(node):
                    continue
                kind = VolumeKind.DEVICE if node.is_block else VolumeKind.FILE
        except FvdError:
            continue  # not readable by this user, no medium...: not something to list
        names.append(VolumeName(kind, str(entry.absolute())))
    return names


def _look(name: VolumeName) -> Listed | None:
    from fvd.api.verbs import info

    try:
        found: Info = info(str(name))
        return Listed(str(name), "closed" if found.uri is None else "served", found)
    except NotFound:
        return None  # removed meanwhile
    except FvdError as error:
        return Listed(str(name), error.kind, None, str(error))
