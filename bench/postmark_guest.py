# SPDX-License-Identifier: Apache-2.0
"""PostMark in a guest: makes a file system, creates files, does transactions on them, and pauses after each.

PostMark itself is stopped while the guest pauses, and everything is written before: what reached the disk until then belongs to that phase.
Knows nothing of what lies under the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PHASES = ("mkfs", "creation", "transactions")  # the guest pauses under these names, when each is over
PROGRAMS = ("postmark", "mkfs.ext4")
SCRIPT = r"""
pause booted
mkfs.ext4 -q @MKFS@ /dev/vda || exit 1
mount -t ext4 /dev/vda /run/disk || exit 1
over() {
    sync
    cat /sys/block/vda/stat >"$folder/stat-$1"
    df --block-size=1 --output=used /run/disk | tail -n 1 >"$folder/used-$1"
    pause "$1"
}
over mkfs
cat >/run/config <<END
set location /run/disk
set number @FILES@
set size @SMALLEST@ @LARGEST@
set subdirectories @FOLDERS@
set transactions @TRANSACTIONS@
set seed @SEED@
set read @PIECE@
set write @PIECE@
set buffering false
run
quit
END
mkfifo /run/says
postmark </run/config >/run/says &
postmark=$!
while read -r line; do
    echo "$line"
    case "$line" in
    "Creating files"*Done) kill -STOP $postmark; over creation; kill -CONT $postmark ;;
    "Performing transactions"*Done) kill -STOP $postmark; over transactions; break ;;
    esac
done </run/says
kill -KILL $postmark
test -s "$folder/stat-transactions"
"""


@dataclass(frozen=True)
class PostMark:
    files: int
    smallest: int  # bytes
    largest: int
    folders: int
    transactions: int
    seed: int = 42
    piece: int = 4096  # bytes of one read or write
    mkfs: str = ""  # options

    def script(self) -> str:
        words = {name.upper(): value for name, value in vars(self).items()}
        text = SCRIPT
        for name, value in words.items():
            text = text.replace(f"@{name}@", str(value))
        return text

    def __str__(self) -> str:
        size = f"{self.files} files of {self.smallest}-{self.largest} bytes in {self.folders} folders"
        return f"{size}, {self.transactions} transactions, seed {self.seed}, pieces of {self.piece} bytes"


@dataclass(frozen=True)
class GuestCount:
    """What the guest's kernel counted at its disk, so far."""

    reads: int
    writes: int
    flushes: int
    used_bytes: int  # in its file system


def counted(folder: Path, phase: str) -> GuestCount:
    """When a phase was over."""
    fields = (folder / f"stat-{phase}").read_text().split()
    used = int((folder / f"used-{phase}").read_text())
    return GuestCount(int(fields[0]), int(fields[4]), int(fields[15]), used)
