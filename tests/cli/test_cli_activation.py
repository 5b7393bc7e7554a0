# SPDX-License-Identifier: Apache-2.0
"""Sockets that are handed over: real nbdinfo, systemd-socket-activate, and a signal before anything is served."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fvd_commands import COMMAND, Done

from fvd.cli import activation
from fvd.cli.main import build_parser
from fvd.errors import InvalidArgument

pytestmark = pytest.mark.pure
ROOT = Path(__file__).resolve().parent.parent.parent
FvdLv = Callable[..., Done]


@pytest.fixture
def disk(fvd_lv: FvdLv) -> str:
    fvd_lv("provision", "file:vm1.img", "--size", "1G")
    return "file:vm1.img"


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def test_nbdinfo_starts_the_server_itself(disk: str, fvd_lv: FvdLv) -> None:
    needs("nbdinfo")
    words = ["nbdinfo", "--size", "--", "[", *COMMAND, "serve", disk, "]"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{1 << 30}\n", "the size and nothing else"
    wait_until(lambda: "served at" not in fvd_lv("info", disk).out)


def test_a_service_managers_socket(disk: str, fvd_lv: FvdLv, workdir: Path) -> None:
    """The command of the unit, with the --socket that it has anyway, and a socket for guests beside it; the names stay the manager's."""
    needs("systemd-socket-activate")
    needs("nbdinfo")
    path, guests = workdir / "vm1.nbd", workdir / "vm1.vhost"
    environment = [f"--setenv={name}" for name in ("PYTHONPATH", "FVD_RUNTIME_DIR", "FVD_PENDING_DIR")]
    serve = ["serve", disk, "--socket", "vm1.nbd", "--vhost-user", str(guests)]
    command = ["systemd-socket-activate", f"--listen={path}", f"--listen={guests}", *environment, *COMMAND, *serve]
    manager = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_until(path.exists)
        uri = f"nbd+unix:///vm1.img?socket={path}"
        size = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=60, check=True)
        assert size.stdout == f"{1 << 30}\n"
        info = fvd_lv("info", disk, "--output", "json").json
        assert (info["uri"], info["vhost_user"]) == (uri, str(guests))
        manager.terminate()  # which has become the server
        out, _ = manager.communicate(timeout=60)
        assert (manager.returncode, out) == (0, "")
        assert path.exists() and guests.exists()
    finally:
        if manager.poll() is None:
            manager.kill()
            manager.communicate()


def test_what_is_said_twice_must_agree(disk: str, workdir: Path) -> None:
    words = ["nbdinfo", "--size", "--", "[", *COMMAND, "serve", disk]
    needs("nbdinfo")
    for other, message in (
        (["--socket", "other.sock"], "--socket other.sock is not the socket that was passed"),
        (["--listen", "localhost:0"], "--listen conflicts with the socket that was passed"),
    ):
        done = subprocess.run([*words, *other, "]"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0 and message in done.stderr


def test_a_place_is_needed(disk: str, fvd_lv: FvdLv) -> None:
    assert "--socket PATH, --listen HOST:PORT or --vhost-user PATH" in fvd_lv("serve", disk, code=2).err


def test_descriptors_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that took its sockets and forgot to clear the environment: they are not ours."""
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert activation.take_sockets() == []
    assert "LISTEN_FDS" not in os.environ


@pytest.mark.parametrize("count", ["", "0", "-1", "one", "99999"])
def test_a_number_of_descriptors_that_is_none(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    with pytest.raises(InvalidArgument, match="LISTEN_FDS"):
        activation.take_sockets()


def handed_over(make: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command whose descriptor 3 is what the Python expression `make` gives."""
    code = f"""
import os, socket, sys
given = {make}
os.dup2(os.dup(given.fileno()), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="disk")
os.execv(sys.executable, {[sys.executable, "-m", "fvd.cli", *words]!r})
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_what_is_no_listening_socket_is_refused(disk: str) -> None:
    done = handed_over("open('/dev/null')", "serve", disk)
    assert done.returncode == 2 and "descriptor 3 (disk), handed over by LISTEN_FDS, is no socket" in done.stderr
    done = handed_over("socket.socket(socket.AF_UNIX)", "serve", disk)
    assert done.returncode == 2 and "needs ListenStream= and Accept=no" in done.stderr


def test_the_units_agree() -> None:
    unit = (ROOT / "systemd" / "fvd@.socket").read_text()
    [path] = re.findall(r"^ListenStream=(.*)$", unit, re.MULTILINE)
    service = (ROOT / "systemd" / "fvd@.service").read_text()
    [command] = re.findall(r"^ExecStart=/usr/bin/env fvd-lv (.*)$", service, re.MULTILINE)
    arguments = build_parser().parse_args(command.replace("${VOLUME}", "vg0/vm1").replace("$OPTIONS", "").split())
    assert arguments.socket == path


# --- A signal before anything is served ------------------------------------------------------------------------------------------

WAITING = """
import fvd.device.claim as claim
def held(name, ownership, *_):
    print("waiting", flush=True)
    raise claim._Leaving(f"{name} is in use", "a process that is ending", True)
claim._claim_now = held
from fvd.cli.process import run
import sys
sys.exit(run())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_a_server_that_waits_for_a_dying_owner(disk: str, number: signal.Signals, workdir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "serve", disk, "--socket", "vm.sock"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert not (workdir / "vm.sock").exists()
