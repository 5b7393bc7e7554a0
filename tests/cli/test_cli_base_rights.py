# SPDX-License-Identifier: Apache-2.0
"""Commands of root's on a user's image: what it names is not shown, and the error says how to allow it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from another_user import forge_base, give, needs_root, open_folder
from fvd_commands import COMMAND, READY_SECONDS, Done

import fvd
from fvd.errors import Corrupt, InvalidArgument, PermissionDenied

pytestmark = [needs_root, pytest.mark.pure]

SMALL = ("--journal-size", "64K", "--grow-step", "16M")


def fvd_lv(*words: str | Path) -> Done:
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False, timeout=READY_SECONDS)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as found:
        yield found


def test_a_forged_base(folder: Path) -> None:
    base, secret, disk = folder / "base.raw", folder / "shadow", folder / "vm1.img"
    for path in (base, secret):
        path.write_bytes(b"secret".ljust(4096, b"!"))
        path.chmod(0o600 if path is secret else 0o644)
    assert fvd_lv("provision", f"file:{disk}", "--size", "64M", "--base", base, *SMALL).code == 0
    give(disk)
    assert fvd_lv("check", f"file:{disk}").code == 0
    forge_base(disk, str(secret))
    line = f"--base-allow {secret}, or write this line into /etc/fvd/bases: {secret}"
    for read_only in ([], ["--read-only"]):
        done = fvd_lv("serve", f"file:{disk}", "--socket", folder / "nbd", *read_only)
        assert done.code == PermissionDenied.exit_code and line in done.err and done.err.count("\n") == 1 and not done.out
    done = fvd_lv("check", f"file:{disk}")
    assert done.code == Corrupt.exit_code and line in done.out
    assert fvd_lv("check", f"file:{disk}", "--base-allow", secret).code == 0
    assert fvd_lv("info", f"file:{disk}").code == 0


def test_the_python_api(folder: Path) -> None:
    secret, disk = folder / "shadow", folder / "vm1.img"
    secret.write_bytes(b"secret".ljust(4096, b"!"))
    secret.chmod(0o600)
    fvd.provision(f"file:{disk}", "64M", base=secret, journal_size="64K", grow_step="16M")
    give(disk)
    with pytest.raises(PermissionDenied):
        fvd.open(f"file:{disk}")
    with pytest.raises(PermissionDenied):
        fvd.serve(f"file:{disk}", socket=folder / "nbd")
    assert fvd.check(f"file:{disk}").errors and not fvd.check(f"file:{disk}", base_allow=[str(secret)]).errors
    with fvd.open(f"file:{disk}", base_allow=[str(secret)]) as opened:
        assert opened.pread(0, 6) == b"secret"
    fvd.serve(f"file:{disk}", socket=folder / "nbd", base_allow=[str(secret)]).close()
    with pytest.raises(InvalidArgument, match="list of bases"):
        fvd.open(f"file:{disk}", base_allow=str(secret))
