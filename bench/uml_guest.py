# SPDX-License-Identifier: Apache-2.0
"""A User-Mode Linux guest with a disk: a kernel of its own, with its file system, page cache and virtio-blk driver, as an ordinary process.

qemu-storage-daemon exports the disk as vhost-user-blk; the guest sees /dev/vda. Its root is this machine's own file system, so that every
program here is there. What it does is a shell script. No time that is taken in it is a measurement. Knows no format and no application.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from machine import CannotMeasure, need

PROGRAMS = ("qemu-storage-daemon", "linux.uml")
NODE = "disk"  # the name of the node that the guest gets
POLL_SECONDS = 0.05
PAUSE = r"""
pause() {  # until the host has seen it
    echo "$1" >"$folder/pause.new"
    mv "$folder/pause.new" "$folder/pause"
    while [ -e "$folder/pause" ]; do sleep 0.05; done
}
"""
INIT = r"""#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
folder=@FOLDER@
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir -p /run/modules/lib/modules /run/disk
ln -s "/usr/lib/uml/modules/$(uname -r)" /run/modules/lib/modules/
modprobe -d /run/modules virtio_blk
echo "write back" >/sys/block/vda/cache_type 2>/dev/null  # as a disk with a cache: otherwise its file system never flushes
export folder
sh "$folder/script" >"$folder/printed" 2>&1
echo "$?" >"$folder/ended"
sync
halt -f
"""


def until(what: Callable[[], object], seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise CannotMeasure(otherwise)
        time.sleep(0.01)


def nbd_node(socket_path: Path, options: str = "") -> str:
    """The guest's disk is what an NBD server serves."""
    return f"driver=nbd,node-name={NODE},discard=unmap,server.type=unix,server.path={socket_path}{options}"


@contextlib.contextmanager
def exported(nodes: Sequence[str], vhost: Path, *, writable: bool = True) -> Iterator[None]:
    """qemu-storage-daemon with these block nodes; the one named `NODE` is exported at `vhost`."""
    need(*PROGRAMS)
    vhost.unlink(missing_ok=True)
    command = ["qemu-storage-daemon"]
    for node in nodes:
        command += ["--blockdev", node]
    command += ["--export", f"type=vhost-user-blk,id=export,node-name={NODE},addr.type=unix,addr.path={vhost}"]
    command[-1] += ",writable=on" if writable else ""
    daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: vhost.exists() or daemon.poll() is not None, 20, "qemu-storage-daemon does not export vhost-user-blk")
        if daemon.poll() is not None:
            assert daemon.stderr is not None
            raise CannotMeasure(f"qemu-storage-daemon: {daemon.stderr.read().strip()}")
        yield
    finally:
        daemon.terminate()
        daemon.communicate()


def run_guest(
    folder: Path, vhost: Path, script: str, *, memory: str, timeout_seconds: float, on_pause: Callable[[str], None] | None = None
) -> None:
    """Boots a guest with the disk at `vhost`, and runs `script` in it. What that prints is then in `folder`/printed.

    In the script `$folder` is `folder`, the same on both sides; and `pause NAME` waits until `on_pause` has returned here.
    """
    pause = folder / "pause"
    for name in ("ended", "printed", "pause"):
        (folder / name).unlink(missing_ok=True)
    (folder / "script").write_text(PAUSE + script)
    init = folder / "init"
    init.write_text(INIT.replace("@FOLDER@", str(folder)))
    init.chmod(0o755)
    words = ["linux.uml", f"mem={memory}", f"init={init}", "root=hostfs", "rootfstype=hostfs", "rootflags=/", "rw", "quiet"]
    words += ["con=null", "con0=fd:0,fd:1", f"virtio_uml.device={vhost}:2", f"uml_dir={folder}/", "umid=guest"]
    environment = {**os.environ, "TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else None
    with (folder / "kernel.log").open("wb") as log:
        guest = subprocess.Popen(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        end = time.monotonic() + timeout_seconds
        try:
            while guest.poll() is None and time.monotonic() < end:
                if on_pause is not None and pause.exists():
                    on_pause(pause.read_text().strip())
                    pause.unlink()
                time.sleep(POLL_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guest.pid, signal.SIGKILL)  # its processes outlive its kernel
            guest.wait()
    ended = (folder / "ended").read_text().strip() if (folder / "ended").exists() else f"nothing within {timeout_seconds:.0f} s"
    if ended != "0":
        last = [path.read_text(errors="replace")[-800:] for path in (folder / "printed", folder / "kernel.log") if path.exists()]
        raise CannotMeasure(f"the guest's script ended with {ended}: " + " ".join(last))
