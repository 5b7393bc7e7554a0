# SPDX-License-Identifier: Apache-2.0
"""`make demo-lvm` and `make demo VG=...`: all of the story in a guest, what an interruption leaves, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from machines import ROOT, UML, require_guest

DEMO = ROOT / "scripts" / "demo"
CLAIMS = 30

# Interrupted where most is to be taken back: the server and its waiting writes, both volumes, the spare device in the group.
INTERRUPTED = r"""
import re, signal, subprocess, sys

def out(*words):
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split()

subprocess.run(["vgcreate", "vg0", "/dev/ubda"], check=True)
subprocess.run(["lvcreate", "--yes", "--size", "64m", "--name", "theirs", "vg0"], check=True)
words = [sys.executable, sys.argv[1], "vg0", "--spare", "/dev/ubdb"]
demo = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
for line in demo.stdout:
    print(line, end="", flush=True)
    if line.startswith("$ vgextend"):
        demo.send_signal(signal.SIGINT)
print("ended with", demo.wait())
print("volumes", out("lvs", "--noheadings", "-o", "lv_name"))
print("devices", out("pvs", "--noheadings", "-o", "pv_name"))
"""


def in_guest(folder: Path, group_size: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
    disks = {folder / "group.img": group_size, folder / "spare.img": "2G"}
    words = [sys.executable, str(UML), "--timeout", "280", *(word for disk, size in disks.items() for word in ("--disk", f"{disk}:{size}"))]
    try:
        return run(*words, "--", "env", "-u", "FVD_RUNTIME_DIR", *command)  # it is the guest's root who runs it
    finally:
        for disk in disks:
            disk.unlink(missing_ok=True)


def run(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    print(done.stdout)
    assert isinstance(done, subprocess.CompletedProcess)
    return done


@pytest.mark.slow
@pytest.mark.release_only
def test_the_whole_story(tmp_path: Path) -> None:
    """As `make demo-lvm` runs it."""
    require_guest()
    done = run(sys.executable, DEMO, "--uml", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0
    held = re.search(r"^All (\d+) checks passed\.$", done.stdout.rstrip(), re.MULTILINE)
    assert held and int(held[1]) >= CLAIMS and done.stdout.rstrip().endswith(held[0])
    assert "MiB/s" not in done.stdout.partition("=== Times of this run")[2], "a guest's speeds are no measure of fvd"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.release_only
def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    require_guest()
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    done = in_guest(tmp_path, "4G", sys.executable, script, DEMO)
    assert done.returncode == 0
    assert "Taking back what the demo has made" in done.stdout and "checks passed" not in done.stdout
    assert done.stdout.splitlines()[-3:] == ["ended with 130", "volumes ['theirs']", "devices ['/dev/ubda']"]


@pytest.mark.slow
@pytest.mark.release_only
def test_what_is_not_empty_or_too_small_is_refused(tmp_path: Path) -> None:
    """Nothing of the group, and nothing of the spare device, is touched."""
    require_guest()
    lines = [
        "exec 2>&1",
        "vgcreate vg0 /dev/ubda",
        'demo() { echo "try $*"; "$python" "$demo" "$@"; echo "ended with $?"; }',
        "demo vg0 --spare /dev/ubda",
        "demo vg0 --spare /dev/null",
        "mkfs.ext4 -q /dev/ubdb; demo vg0 --spare /dev/ubdb; blkid -o value -s TYPE /dev/ubdb",
        "wipefs -aq /dev/ubdb",
        "lvcreate --yes -q --size 100m --name theirs --addtag fvd.disk vg0; demo vg0 --spare /dev/ubdb",
        "lvcreate --yes -q --size 2g --name more vg0; demo vg0",
        "lvs --noheadings -o lv_name; pvs --noheadings -o pv_name",
    ]
    done = in_guest(tmp_path, "4G", "env", f"python={sys.executable}", f"demo={DEMO}", "sh", "-c", "\n".join(lines))
    tries = [text.strip() for text in re.split(r"^try .*$", done.stdout, flags=re.MULTILINE)[1:]]
    reasons = [
        "is not empty, so it is not touched",
        "is not a block device",
        "is not empty",
        "vg0/theirs could not grow",
        "the demo needs 2.03 GiB",
    ]
    assert len(tries) == len(reasons)
    for text, reason in zip(tries, reasons, strict=True):
        assert reason in text and "ended with 1" in text and "Traceback" not in text and "$ " not in text
    assert "ext4" in tries[2]
    assert tries[-1].split()[-3:] == ["more", "theirs", "/dev/ubda"]


# --- Quick: on any machine ----------------------------------------------------------------------------------------------------------


def test_without_root_it_says_what_to_type() -> None:
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if as_nobody and run(*as_nobody, sys.executable, "-c", "import fvd, nbd, numpy").returncode != 0:
        pytest.skip("nobody may not read this tree, or its Python lacks libnbd")
    done = run(*as_nobody, sys.executable, DEMO, "vg0", "--spare", "/dev/sdx")
    assert done.returncode == 1 and "needs root" in done.stdout and "sudo make demo VG=vg0 SPARE=/dev/sdx" in done.stdout


def test_root_goes_on_as_root_where_others_may_not_enter(tmp_path: Path) -> None:
    """A tree below /root: nobody may not even run its Python."""
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python").symlink_to(sys.executable)
    code = (
        "import importlib.machinery, importlib.util, os, pathlib, sys\n"
        f"sys.path.insert(0, {str(DEMO.parent)!r})\n"
        f"loader = importlib.machinery.SourceFileLoader('demo', {str(DEMO)!r})\n"
        "demo = importlib.util.module_from_spec(importlib.util.spec_from_loader('demo', loader))\n"
        "loader.exec_module(demo)\n"
        f"demo.sys.executable = {str(closed / 'python')!r}\n"
        f"demo.become_nobody(pathlib.Path({str(tmp_path)!r}))\n"
        "print('uid', os.getuid())\n"
    )
    done = run(sys.executable, "-B", "-c", code)
    assert done.returncode == 0 and "others may not read this tree" in done.stdout and done.stdout.endswith("uid 0\n")


@pytest.mark.parametrize("group", ["fvd-no-such-group", "vg0/vm1", "/dev/vg0"])
def test_a_group_that_is_none(group: str) -> None:
    if os.geteuid() != 0 or not (shutil.which("lvs") or Path("/sbin/lvs").exists()):
        pytest.skip("needs root and lvm2")
    done = run(sys.executable, DEMO, group)
    expected = f"there is no volume group {group}" if "/" not in group else "is not the name of a volume group"
    assert done.returncode == 1 and expected in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize("arguments", [["--uml", "vg0"], ["--spare", "/dev/sdx"]])
def test_arguments_that_do_not_go_together(arguments: list[str]) -> None:
    assert run(sys.executable, DEMO, *arguments).returncode == 2


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], {"VG": "vg0", "SPARE": "/dev/sdx"}, []),
        (["VG=vg0"], {"SPARE": "/dev/sdx"}, ["vg0"]),
        (["VG=vg0", "SPARE=/dev/sdx"], {}, ["vg0", "--spare", "/dev/sdx"]),
    ],
)
def test_make_takes_a_group_from_its_command_line_alone(words: list[str], environment: dict[str, str], expected: list[str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    done = run("make", "--no-print-directory", "--dry-run", "demo", *words, env={**inherited, **environment})
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split()[1:] == ["scripts/demo", *expected]
