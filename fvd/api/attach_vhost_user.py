# SPDX-License-Identifier: Apache-2.0
"""What is given to QEMU or libvirt so that a virtual machine uses a disk by vhost-user: the server works in the machine's memory, which
must be shared for that. Pure text generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fvd.api.attach_text import attributes, check_xml, keyval, shell_line

DEFAULT_MEMORY = "1G"
# A server that went away is looked for once a second; the machine's requests wait meanwhile, however long that takes.
RECONNECT_SECONDS = 1
_MEMORY = "fvd-memory"
MEMORY_XML = """\
<memoryBacking>
  <source type='memfd'/>
  <access mode='shared'/>
</memoryBacking>"""


@dataclass(frozen=True)
class AttachVhostUser:
    """A disk served by vhost-user as QEMU and libvirt want to be told of it."""

    path: str  # of the socket
    queues: int
    qemu_args: list[str]  # for QEMU's command line, the machine's memory included; not yet quoted for a shell
    qmp: list[dict[str, Any]]  # for a machine that was started with such memory
    libvirt_xml: str  # a <disk> element
    libvirt_memory_xml: str  # for the <domain> itself
    notes: list[str]

    def shell_line(self) -> str:
        """The arguments for QEMU as a shell takes them, over several lines."""
        return shell_line(self.qemu_args)


def describe_vhost_user(node: str, path: str, queues: int, target: str, memory_bytes: int) -> AttachVhostUser:
    """`node`: the disk's name in QEMU. Raises InvalidArgument: a path that XML cannot hold."""
    check_xml(path)
    socket = f"{node}-socket"
    device = {"driver": "vhost-user-blk-pci", "id": node, "chardev": socket, "num-queues": queues}
    memory = {"id": _MEMORY, "size": memory_bytes, "share": True}
    options = {"id": socket, "path": path, "reconnect": RECONNECT_SECONDS}
    address = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": address, "server": False, "reconnect": RECONNECT_SECONDS}}
    return AttachVhostUser(
        path=path,
        queues=queues,
        qemu_args=[
            *("-object", ",".join(["memory-backend-memfd", *keyval(memory)])),
            *("-machine", f"memory-backend={_MEMORY}"),
            *("-chardev", ",".join(["socket", *keyval(options)])),
            *("-device", ",".join(["vhost-user-blk-pci", *keyval({key: value for key, value in device.items() if key != "driver"})])),
        ],
        qmp=[
            {"execute": "chardev-add", "arguments": {"id": socket, "backend": backend}},
            {"execute": "device_add", "arguments": device},
        ],
        libvirt_xml=_libvirt_xml(path, queues, target),
        libvirt_memory_xml=MEMORY_XML,
        notes=[
            f"vhost-user: the machine's memory is shared with the server: {memory_bytes >> 20} MiB as written (--memory; it replaces -m). "
            "A machine that was started without such memory uses NBD (--over nbd).",
            "vhost-user: QEMU must run on this host, as a user who may open the socket. A disk has one such machine at a time; NBD clients "
            "are served beside it.",
            "QMP: on a q35 machine device_add needs a free root port too: bus=NAME of a pcie-root-port.",
            "libvirt: before it starts, the domain needs the <memoryBacking> that stands beside the disk.",
        ],
    )


def _libvirt_xml(path: str, queues: int, target: str) -> str:
    return "\n".join([
        "<disk type='vhostuser' device='disk'>",
        f"  <driver{attributes({'name': 'qemu', 'type': 'raw', 'queues': str(queues)})}/>",
        f"  <source type='unix'{attributes({'path': path})}>",
        f"    <reconnect enabled='yes' timeout='{RECONNECT_SECONDS}'/>",
        "  </source>",
        f"  <target dev='{target}' bus='virtio'/>",
        "</disk>",
    ])  # fmt: skip
