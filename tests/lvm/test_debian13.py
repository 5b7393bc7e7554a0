# SPDX-License-Identifier: Apache-2.0
"""On Debian 13's lvm2, udev and Python, in a guest: the demo on a volume group, and what lvm2 answers where something is wrong.

The demo provisions, lists, serves and grows a disk, fills its group and extends it, kills the server, checks, and removes the disk.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from machines import ROOT, UML, require_guest

CLAIMS = 30
GUEST_SECONDS = 900
SETUP_SECONDS = 900

pytestmark = [pytest.mark.release_only, pytest.mark.slow]


@dataclass(frozen=True)
class Debian13:
    root: Path
    tree: Path  # fvd, built for its Python

    def run(self, folder: Path, disks: tuple[str, ...], *command: str | Path) -> str:
        """The output of a command in a guest with disks of these sizes."""
        files = [folder / f"disk{number}.img" for number in range(len(disks))]
        options = [word for file, size in zip(files, disks, strict=True) for word in ("--disk", f"{file}:{size}")]
        words = [
            sys.executable,
            UML,
            "--root",
            self.root,
            "--share",
            self.tree,
            "--share",
            folder,
            "--timeout",
            str(GUEST_SECONDS),
            *options,
        ]
        environment = {name: value for name, value in os.environ.items() if name != "FVD_RUNTIME_DIR"}
        try:
            done = subprocess.run(
                [*map(str, words), "--", "env", f"PYTHONPATH={self.tree}", "PYTHONDONTWRITEBYTECODE=1", *map(str, command)],
                cwd=self.tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                timeout=GUEST_SECONDS + 30,
                check=False,
            )
        finally:
            for file in files:
                file.unlink(missing_ok=True)
        print(done.stdout)
        assert done.returncode == 0
        return done.stdout


@pytest.fixture(scope="module")
def debian13() -> Debian13:
    """Skips, with the reason, where it cannot be made; in CI that is a failure."""
    require_guest()
    words = [str(ROOT / "scripts" / "debian13"), "tree"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SETUP_SECONDS, check=False)
    if done.returncode != 0:
        why = f"no Debian 13 to test on: {done.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    root, tree = done.stdout.splitlines()[-2:]
    return Debian13(Path(root), Path(tree))


def test_the_versions(debian13: Debian13, tmp_path: Path) -> None:
    """That it is the machine it is taken for; and the story of lvm2, whose outcomes are the same in each version."""
    shell = "cat /etc/debian_version; lvm version; python3 --version; exec python3 tests/lvm/lvm2_story.py /dev/null /dev/ubd[abc]"
    said = debian13.run(tmp_path, ("1G", "1G", "1G"), "sh", "-c", shell)
    assert said.startswith("13.") and re.search(r"LVM version: +2\.03\.31", said) and "Python 3.13." in said


def test_the_demo(debian13: Debian13, tmp_path: Path) -> None:
    shell = "export TMPDIR=/dev/shm; vgcreate vg0 /dev/ubda && exec python3 scripts/demo vg0 --spare /dev/ubdb"
    said = debian13.run(tmp_path, ("40G", "8G"), "sh", "-c", shell)
    held = re.search(r"^All (\d+) checks passed\.$", said, re.MULTILINE)
    assert held and int(held[1]) >= CLAIMS
