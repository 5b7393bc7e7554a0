# SPDX-License-Identifier: Apache-2.0
"""Which devices hold the physical volumes of a group, as far as the kernel and udev know: nothing is read from any device.

lvm left alone reads every block device of the host, and waits for each that does not answer. What is found here is a guess, which a look
at the group's metadata completes (`commands.py`): it names each of the group's physical volumes, by a UUID that udev knows the device of.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from fvd.lvm import dm

_UDEV_CONTROL = "/run/udev/control"
_LVM_DEVICE = "LVM-"
_ATTACHED = "fvd:"  # as which the kernel has the server of a disk that is attached (fvd/device/nbd_devices.py)


@dataclass(frozen=True)
class Labelled:
    """A device on which udev has seen a physical volume."""

    path: str
    uuid: str  # of the physical volume


def labelled() -> list[Labelled] | None:
    """All such devices. Logical volumes and attached disks are left out: what lies in those is their guests' business, and whoever begins
    to serve such a disk would wait for himself. None: nobody knows, for no udev runs."""
    import pyudev

    if not Path(_UDEV_CONTROL).exists():
        return None
    devices = []
    with contextlib.suppress(OSError):
        for device in pyudev.Context().list_devices(subsystem="block", ID_FS_TYPE="LVM2_member"):
            path, uuid = device.device_node, device.properties.get("ID_FS_UUID")
            ours = dm.is_lvm_device(int(device.device_number)) or _is_attached(Path(device.sys_path))
            if path and uuid and not ours:
                devices.append(Labelled(str(path), str(uuid)))
    return sorted(devices, key=lambda each: each.path)


def in_use(group: str) -> dict[tuple[int, int], str]:
    """The devices on which the active volumes of a group lie now, by the kernel's tables: paths, by major and minor number."""
    paths: dict[tuple[int, int], str] = {}
    for folder in Path("/sys/block").glob("dm-*"):
        if _text(folder / "dm" / "uuid").startswith(_LVM_DEVICE) and dm.split_name(_text(folder / "dm" / "name"))[0] == group:
            for slave in _listed(folder / "slaves"):
                major, _, minor = _text(slave / "dev").partition(":")
                if major.isdigit() and minor.isdigit() and not _text(slave / "dm" / "uuid").startswith(_LVM_DEVICE):
                    paths[int(major), int(minor)] = f"/dev/{slave.name.replace('!', '/')}"
    return paths


def _is_attached(folder: Path) -> bool:
    """A disk's, or a partition's, which lies in it."""
    return any(_text(place / "backend").startswith(_ATTACHED) for place in (folder, folder.parent))


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
