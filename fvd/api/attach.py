# SPDX-License-Identifier: Apache-2.0
"""What is given to QEMU or libvirt so that a virtual machine uses a served disk: command line, QMP, XML. Knows NBD URIs.

``attach_info`` asks where the volume is served; ``describe`` is pure text generation, and asks nobody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from fvd.api.attach_text import attributes, check_xml, keyval, shell_line
from fvd.api.attach_vhost_user import DEFAULT_MEMORY, AttachVhostUser, describe_vhost_user
from fvd.api.hints import how_to_serve, plain_name
from fvd.api.types import Info
from fvd.errors import InvalidArgument, NotFound, quoted
from fvd.modes import WRITE_THROUGH_CACHE_MODES
from fvd.units import parse_size

# For so long QEMU holds a guest's requests back while the server is away; then they fail. Longer than the slowest `systemctl restart`
# (systemd/fvd@.service: TimeoutStopSec, RestartSec), so that a restart, and a crash, is a pause for the guest and no error.
RECONNECT_DELAY_SECONDS = 120
DEFAULT_PORT = "10809"
# QEMU: at most 31 bytes; letters, digits, - . _, beginning with a letter.
NODE_NAME_BYTES = 31
DEFAULT_TARGET = "vdb"
# "All addresses" is where a server listens, and nowhere a client can go.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
_READ_TWICE = re.compile("[%&]")  # of a socket's path in a URI; QEMU 10 and later, until they are fixed
_TARGET = re.compile(r"vd[a-z]{1,3}", re.ASCII)  # a virtio disk


@dataclass(frozen=True)
class AttachInfo:
    """A served disk as QEMU and libvirt want to be told of it. What is about NBD is empty where it is served by vhost-user alone."""

    volume: str
    uri: str
    export: str
    read_only: bool
    qemu_args: list[str]  # for QEMU's command line, not yet quoted for a shell
    blockdev: dict[str, Any]  # the argument of QMP's blockdev-add, and what qemu-storage-daemon and qemu-img (json:{...}) take
    qmp: list[dict[str, Any]]  # QMP commands, in order
    libvirt_xml: str  # a <disk> element: for virsh attach-device, or into a domain's <devices>
    notes: list[str]  # what whoever uses it must know
    vhost_user: AttachVhostUser | None = None  # the faster way, if the disk is served at such a socket too; all above is NBD

    def shell_line(self) -> str:
        """The arguments for QEMU as a shell takes them, over several lines."""
        return shell_line(self.qemu_args)


def attach_info(volume: str, *, iothread: bool = False, target: str = DEFAULT_TARGET, memory: int | str = DEFAULT_MEMORY) -> AttachInfo:
    """How a virtual machine gets this disk, which must be served. ``iothread``: with a thread of its own in QEMU (NBD); ``target``:
    libvirt's name for the disk in the machine, such as vdb; ``memory``: the machine's, which vhost-user shares with the server.

    Raises NotFound (no such volume, or nobody serves it), InvalidArgument, and what ``info`` raises.
    """
    from fvd.api.verbs import info

    disk = info(volume)
    if disk.uri is None:
        raise NotFound(f"{disk.volume} is not served; {how_to_serve(disk.volume)}")
    return describe(disk, iothread=iothread, target=target, memory_bytes=parse_size(memory))


def describe(
    disk: Info, *, iothread: bool = False, target: str = DEFAULT_TARGET, memory_bytes: int = parse_size(DEFAULT_MEMORY)
) -> AttachInfo:
    """The texts for a disk that is served. Raises InvalidArgument: no such target, or a path that XML cannot hold."""
    if not _TARGET.fullmatch(target):
        raise InvalidArgument(f"{quoted(target)} is no name of a virtio disk in a virtual machine; write for example vdb")
    node = node_name(disk)
    vhost_user = None if disk.vhost_user is None else describe_vhost_user(node, disk.vhost_user, disk.queues, target, memory_bytes)
    if not disk.uri:
        return AttachInfo(disk.volume, "", "", disk.read_only, [], {}, [], "", [], vhost_user)
    uri, everywhere = reachable(disk.uri)
    export, server = parse_uri(uri)
    check_xml(export, *server.values())
    blockdev = _blockdev(node, export, server, disk.read_only)
    thread = f"{node}-thread"
    # An error pauses the machine (`cont` goes on) rather than reach the guest's file system: a server that is away for longer
    # than the delay, or one that was stopped while writes waited for storage.
    device = {"driver": "virtio-blk-pci", "id": node, "drive": node, "werror": "stop", "rerror": "stop"}
    qmp = [{"execute": "blockdev-add", "arguments": blockdev}]
    qemu_args = ["-blockdev", ",".join(keyval(blockdev))]
    if iothread:
        device["iothread"] = thread
        qmp.insert(0, {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": thread}})
        qemu_args[:0] = ["-object", f"iothread,id={thread}"]
    qmp.append({"execute": "device_add", "arguments": device})
    qemu_args += ["-device", ",".join([device["driver"], *keyval({key: value for key, value in device.items() if key != "driver"})])]
    return AttachInfo(
        volume=disk.volume,
        uri=uri,
        export=export,
        read_only=disk.read_only,
        qemu_args=qemu_args,
        blockdev=blockdev,
        qmp=qmp,
        libvirt_xml=_libvirt_xml(export, server, disk.read_only, iothread, target),
        notes=_notes(disk, server, iothread, target, everywhere=everywhere),
        vhost_user=vhost_user,
    )


def reachable(uri: str) -> tuple[str, bool]:
    """An address that a client can connect to, and whether the server listens on all of its host's: then it is the loopback's."""
    try:
        parts = urlsplit(uri)
        loopback = _LOOPBACK.get(parts.hostname or "")
    except ValueError:  # no URI: parse_uri says why
        return uri, False
    if loopback is None or parts.scheme != "nbd":
        return uri, False
    port = parts.netloc.removeprefix("[").removeprefix(parts.hostname or "").removeprefix("]")  # with its colon, as it is written
    return parts._replace(netloc=f"{loopback}{port}").geturl(), True


def parse_uri(uri: str) -> tuple[str, dict[str, str]]:
    """An NBD URI as fvd writes them: the export's name, and QEMU's description of the server. Raises InvalidArgument."""
    try:
        parts = urlsplit(uri)
        port = parts.port  # raises ValueError when it is no number
    except ValueError as error:
        raise InvalidArgument(f"{quoted(uri)} is no NBD URI: {error}") from None
    export = unquote(parts.path[1:])
    if parts.scheme == "nbd+unix":
        path = dict(parse_qsl(parts.query.replace("+", "%2B"))).get("socket")  # in an NBD URI a plus is a plus
        if path:
            return export, {"type": "unix", "path": path}
    elif parts.scheme == "nbd" and parts.hostname:
        host = parts.netloc.rpartition(":")[0] if port is not None else parts.netloc
        return export, {"type": "inet", "host": host.strip("[]"), "port": DEFAULT_PORT if port is None else str(port)}
    raise InvalidArgument(f"{quoted(uri)} is no NBD URI that fvd knows: nbd+unix:///EXPORT?socket=PATH or nbd://HOST:PORT/EXPORT")


def node_name(disk: Info) -> str:
    """A name for the disk inside QEMU: always the same for one disk, and another for another disk of the same name."""
    tail = f"-{disk.uuid[:8]}"
    readable = plain_name(disk.volume.rpartition("/")[2])
    return f"fvd-{readable}"[: NODE_NAME_BYTES - len(tail)].rstrip("-._") + tail


def _blockdev(node: str, export: str, server: dict[str, str], read_only: bool) -> dict[str, Any]:
    blockdev: dict[str, Any] = {
        "driver": "nbd",
        "node-name": node,
        "server": server,
        "export": export,
        "reconnect-delay": RECONNECT_DELAY_SECONDS,
        "cache": {"direct": True, "no-flush": False},
        "read-only": read_only,
    }
    if not read_only:
        # What the guest discards, or overwrites with zeros, takes no storage.
        blockdev |= {"discard": "unmap", "detect-zeroes": "unmap"}
    return blockdev


def _libvirt_xml(export: str, server: dict[str, str], read_only: bool, iothread: bool, target: str) -> str:
    driver = {"name": "qemu", "type": "raw", "cache": "none", "error_policy": "stop", "rerror_policy": "stop"}
    if not read_only:
        driver |= {"discard": "unmap", "detect_zeroes": "unmap"}
    if iothread:
        driver["iothread"] = "1"
    host = {"transport": "unix", "socket": server["path"]} if server["type"] == "unix" else {"name": server["host"], "port": server["port"]}
    lines = [
        "<disk type='network' device='disk'>",
        f"  <driver{attributes(driver)}/>",
        f"  <source protocol='nbd'{attributes({'name': export})}>",
        f"    <host{attributes(host)}/>",
        f"    <reconnect delay='{RECONNECT_DELAY_SECONDS}'/>",
        "  </source>",
        f"  <target dev='{target}' bus='virtio'/>",
        *(["  <readonly/>"] if read_only else []),
        "</disk>",
    ]
    return "\n".join(lines)


def _notes(disk: Info, server: dict[str, str], iothread: bool, target: str, *, everywhere: bool) -> list[str]:
    notes = [
        "QMP: on a q35 machine device_add needs a free root port too: bus=NAME of a pcie-root-port.",
        "libvirt up to 9.0 does not know <reconnect delay>: without --validate it ignores the element.",
        f"libvirt: the name {target} must be free; --target chooses another.",
    ]
    if disk.pending_log is not None:
        notes.append(
            "A server that is killed loses nothing that it had answered, as long as this host runs and serves the disk again; QEMU sends "
            "again what was not answered."
        )
    elif not disk.read_only and disk.cache not in WRITE_THROUGH_CACHE_MODES:
        notes.append(
            "This server has no log of pending changes (fvd-lv info says why): if it is killed, writes that it had answered and that were "
            "not flushed may be lost, and QEMU does not send them again; serve with --cache writethrough where guests must outlive that."
        )
    if disk.base is not None and not disk.base_released:
        notes.append(
            f"While data still come from {disk.base.path}, a base that does not answer for serve --base-timeout pauses the machine; cont "
            "(virsh resume) goes on when it is back. fvd-lv prefetch start makes the disk independent of it."
        )
    if iothread:
        notes.append("libvirt: the domain needs <iothreads>1</iothreads>, or more.")
    if _READ_TWICE.search(server.get("path", "")):
        notes.append(
            "QEMU 10 decodes the path in an NBD URI twice and refuses this one, for its & or %: give it what stands above, or serve the "
            "disk at a path without them."
        )
    if server["type"] == "unix":
        notes.append("QEMU must run on this host, as a user who may open the socket: see serve --socket-group and --socket-mode.")
    elif everywhere:
        notes.append(f"The server listens on every address: where QEMU runs on another host, write this host's name for {server['host']}.")
    return notes
