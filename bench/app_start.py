# SPDX-License-Identifier: Apache-2.0
"""How much of a real application's start comes from the local disk when its profile, or as much in sequence, has been prefetched.

A User-Mode Linux guest (a kernel of its own, with its file system, page cache and read-ahead) mounts the disk and starts Python with what
is installed here from it. It sees the disk as virtio-blk: qemu-storage-daemon passes its requests on to the NBD server. What a start has
read is what the guest's kernel counts; what of it came from the base is what the server remembers. Its time is kept, and compared with
nothing. The base is an ext4 image that nbdkit serves with a delay of 5 ms and 50 MB/s.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fvd
from disks import RATE_BYTES, READ_DELAY
from machine import loop_device, need, output, server
from suite import Plot, Row, missing, row
from uml_guest import PROGRAMS, exported, nbd_node, run_guest, until

MIB = 1 << 20
GUEST_MEMORY = "512M"
GUEST_TIMEOUT_SECONDS = 120
COPY_RATE_BYTES = 20_000_000  # slow enough to be stopped where it shall end
FREE_BYTES = 64 * MIB  # in the file system
HOW = {"nothing": 0.0, "profile": 1.0, "half": 0.5, "sequence": 1.0}  # what is prefetched, and how much of what the profile comes to
NAMES = {
    "nothing": "share that is local, nothing prefetched",
    "profile": "share that is local, its profile prefetched",
    "half": "the same, the first half of its profile",
    "sequence": "the same, as much as the profile in sequence",
}
# The application: what of this is installed is imported, and something done with it.
APPLICATION = r"""
import argparse, asyncio, ctypes, decimal, email.mime.text, hashlib, http.client, importlib, json, logging.config, sqlite3, ssl, zipfile
wanted = "numpy numpy.linalg numpy.random numpy.fft pytest hypothesis hypothesis.strategies pygments.lexers.python packaging.version"
for name in wanted.split():
    try:
        importlib.import_module(name)
    except ImportError:
        pass
import sys
numpy = sys.modules.get("numpy")
if numpy is not None:
    print(numpy.linalg.svd(numpy.random.default_rng(1).random((60, 60)))[1][0])
table = sqlite3.connect(":memory:")
table.execute("create table t (a, b)")
print(len(sys.modules), json.dumps(hashlib.sha256(b"x").hexdigest())[:9])
"""
SCRIPT = r"""
read -r begun _ </proc/uptime
mount -t ext4 -o ro,noload /dev/vda /run/disk || exit 1
PYTHONPATH=/packages PYTHONDONTWRITEBYTECODE=1 chroot /run/disk @PYTHON@ /application || exit 1
echo "$begun $(cut -d' ' -f1 /proc/uptime) $(cat /sys/block/vda/stat)" >"$folder/measured"
"""


def stage(tree: Path) -> Path:
    """The application with all it needs below `tree`: an interpreter, its library, our packages; links where that goes.

    The interpreter's path.
    """
    python = Path(sys.executable).resolve()
    packages = Path(sysconfig.get_path("purelib"))
    library = Path(sysconfig.get_path("stdlib")).resolve()
    (tree / "application").parent.mkdir(parents=True, exist_ok=True)
    (tree / "application").write_text(APPLICATION)
    for name in ("lib", "lib64", "bin"):
        if (Path("/") / name).is_symlink():
            (tree / name).symlink_to((Path("/") / name).readlink())
    copy(packages, tree / "packages")
    copy(library, below(tree, library))
    # What of shared libraries it maps, the application says itself.
    told = output(sys.executable, "-c", APPLICATION + "\nprint(open('/proc/self/maps').read())")
    mapped = {Path(found) for found in re.findall(r"(/\S+)$", told, re.MULTILINE)}
    for file in sorted({python, *mapped}):
        if file.is_file() and packages not in file.parents and library not in file.parents:
            below(tree, file).parent.mkdir(parents=True, exist_ok=True)
            copy(file, below(tree, file))
            for link in file.parent.iterdir():  # by whose names programs ask for it
                if ".so" in file.name and link.is_symlink() and link.resolve() == file:
                    below(tree, link).unlink(missing_ok=True)
                    below(tree, link).symlink_to(file.name)
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    if loader.exists():
        place = below(tree, loader.parent.resolve() / loader.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            copy(loader.resolve(), place)
    return python


def below(tree: Path, path: Path) -> Path:
    return tree / path.relative_to("/")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["cp", "--archive", "--link", source, target], capture_output=True, check=False).returncode:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "--archive", source, target], capture_output=True, check=True)


def make_image(folder: Path) -> tuple[Path, Path]:
    """An ext4 image with the application; the image, and the interpreter's path in it."""
    need("mke2fs", "nbdkit", *PROGRAMS)
    tree, image = folder / "tree", folder / "base.ext4"
    tree.mkdir()
    python = stage(tree)
    size = int(output("du", "--summarize", "--block-size=1", str(tree)).split()[0])
    size = (size * 11 // 10 // MIB + FREE_BYTES // MIB) * MIB
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", str(tree), str(image), f"{size // 1024}k"], check=True, stdout=subprocess.DEVNULL
    )
    shutil.rmtree(tree)
    return image, python


@contextlib.contextmanager
def served(folder: Path, image: Path) -> Iterator[tuple[str, Path]]:
    """A fresh fvd disk over the image, served without copy-on-read: what a start reads from the base is what is remembered of it."""
    base, path = folder / "base.sock", folder / "disk.sock"
    base.unlink(missing_ok=True)  # nbdkit leaves it behind
    size = image.stat().st_size
    command = ["nbdkit", "--foreground", "--exit-with-parent", "--readonly", "--unix", str(base), "--filter=delay", "--filter=rate"]
    command += ["file", str(image), f"rdelay={READ_DELAY}", f"rate={RATE_BYTES * 8}"]
    with server(command, base), loop_device(size + 64 * MIB) as device:
        fvd.provision(device, size=size, base=f"nbd+unix:///?socket={base}", force=True)
        with server([sys.executable, "-m", "fvd.cli", "serve", device, "--socket", str(path)], path):
            yield device, path


def start(folder: Path, path: Path, python: Path) -> dict[str, float]:
    """The application's start in a guest on the disk: bytes read by its kernel, and seconds (of a guest's clock: a hint, not more)."""
    vhost, measured = folder / "vhost.sock", folder / "measured"
    with exported([nbd_node(path, ",read-only=on")], vhost, writable=False):
        run_guest(folder, vhost, SCRIPT.replace("@PYTHON@", str(python)), memory=GUEST_MEMORY, timeout_seconds=GUEST_TIMEOUT_SECONDS)
    found = measured.read_text().split()
    return {"seconds": float(found[1]) - float(found[0]), "read_bytes": int(found[4]) * 512}


def whole_blocks(profile: Path, block_bytes: int) -> int:
    """Bytes of the blocks that a profile touches: what copying it takes."""
    blocks: set[int] = set()
    for line in profile.read_text().splitlines()[1:]:
        offset, length = json.loads(line)
        blocks.update(range(offset // block_bytes, (offset + length - 1) // block_bytes + 1))
    return len(blocks) * block_bytes


def prefetch(volume: str, wanted_bytes: int, profile: Path | None) -> int:
    """Copies what the profile names, or what comes first on the base, until so many bytes have been copied; how many it were."""
    before = fvd.prefetch_status(volume).remaining_bytes
    fvd.prefetch_start(volume, rate=COPY_RATE_BYTES, profile=profile)
    until(lambda: before - fvd.prefetch_status(volume).remaining_bytes >= wanted_bytes, 120, "prefetching does not come to its end")
    fvd.prefetch_stop(volume)
    return before - fvd.prefetch_status(volume).remaining_bytes


def measure(rounds: int) -> dict[str, Any]:
    need("mke2fs", "nbdkit", *PROGRAMS)
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fvd-bench-") as name:
        folder = Path(name)
        image, python = make_image(folder)
        for number in range(rounds):
            profile = folder / f"profile-{number}"
            for how, share in HOW.items():
                with served(folder, image) as (volume, path):
                    prefetched = 0
                    if share:
                        wanted = int(whole_blocks(profile, fvd.info(volume).block_size) * share)
                        prefetched = prefetch(volume, wanted, None if how == "sequence" else profile)
                    found = start(folder, path, python)
                    recorded = fvd.record_profile(volume, folder / "rest" if share else profile)
                samples.append({"round": number, "how": how, "prefetched_bytes": prefetched, "base_bytes": recorded.bytes, **found})
        return {"samples": samples, "image_bytes": image.stat().st_size, "kernel": output("linux.uml", "--version")}


def taken(result: dict[str, Any], how: str) -> list[dict[str, Any]]:
    return [sample for sample in result["samples"] if sample["how"] == how]


def local_shares(result: dict[str, Any]) -> dict[str, list[float]]:
    return {how: [1 - sample["base_bytes"] / sample["read_bytes"] for sample in taken(result, how)] for how in HOW}


def rows(result: dict[str, Any]) -> list[Row]:
    if "not_measured" in result:
        return [missing("application's start: share with profile - share in sequence", result["not_measured"], goal="> 0")]

    def line(what: str, values: list[float], **more: Any) -> Row:
        return row(f"application's start: {what}", values, **more)

    shares, nothing = local_shares(result), taken(result, "nothing")
    gained = [a - b for a, b in zip(shares["profile"], shares["sequence"], strict=True)]
    found = [line(what, shares[how]) for how, what in NAMES.items()]
    found.append(line("share with profile - share in sequence", gained, goal="> 0"))
    found.append(line("read", [sample["read_bytes"] / MIB for sample in nothing], unit="MiB"))
    found.append(line("prefetched by its profile", [sample["prefetched_bytes"] / MIB for sample in taken(result, "profile")], unit="MiB"))
    found.append(line("the base", [result["image_bytes"] / MIB], unit="MiB"))
    return found


def plots(result: dict[str, Any]) -> list[Plot]:
    if "not_measured" in result:
        return []
    shares = {how: [100 * share for share in found] for how, found in local_shares(result).items()}
    return [
        {
            "name": "application",
            "title": "An application's start: what is already local",
            "kind": "bars",
            "unit": "% of what it reads",
            "x": ["nothing prefetched", "its profile", "half its profile", "as much in sequence"],
            "better": "more",
            "series": [{"name": "fvd", "points": [shares[how] for how in ("nothing", "profile", "half", "sequence")]}],
        }
    ]
