# SPDX-License-Identifier: Apache-2.0
"""examples/agent.py as a real process, with a QEMU that gets its disk; and what it does about a volume group, with a vgextend of ours."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from qemu_running import export, storage_daemon

import fvd
from fvd.api.events import EventKind

AGENT = Path(__file__).resolve().parent.parent.parent / "examples" / "agent.py"
MIB = 1 << 20


def qemu_io(uri: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", *words, uri], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


class Agent:
    """A running agent."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen([sys.executable, str(AGENT), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready "):
            pytest.fail(f"the agent ended with {self.process.wait(30)}: {self.process.communicate()[1]}")
        self.uri = line.split()[1]

    def terminate(self) -> str:
        """A clean end; returns what it logged."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        assert "Traceback" not in said
        return said


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Agent]]:
    monkeypatch.chdir(tmp_path)
    agents: list[Agent] = []

    def run(*words: str) -> Agent:
        agents.append(Agent("file:vm1", "--size", "1G", "--grow-step", "64M", "--socket", "vm1.nbd", *words))
        return agents[-1]

    yield run
    for agent in agents:
        if agent.process.returncode is None:
            agent.process.kill()
            agent.process.communicate()


def test_a_disk_for_a_qemu(start: Callable[..., Agent], tmp_path: Path) -> None:
    """From provision to a write past growth steps through QEMU, and over a restart of the agent that the writer does not notice."""
    with storage_daemon(tmp_path, "--chardev", "socket,id=agent,path=agent.qmp,server=on,wait=off", "--monitor", "agent") as qmp:
        agent = start("--qmp", "agent.qmp")
        [node] = [node["node-name"] for node in qmp.do("query-named-block-nodes") if node["drv"] == "nbd"]
        uri = export(qmp, node, tmp_path / "out.sock")
        qemu_io(uri, "write -P 7 0 200M", "flush")
        found = fvd.info("file:vm1")
        assert found.uri == agent.uri
        assert found.storage_size >= 200 * MIB + found.metadata_size > 64 * MIB
        said = agent.terminate()
        assert "provisioned" in said and f"QEMU has it, as {node}" in said and "extend_done" in said
        assert fvd.check("file:vm1").clean

        agent = start("--qmp", "agent.qmp")
        qemu_io(uri, "read -P 7 0 200M", "write -P 8 300M 64k", "flush")
        qmp.do("block-export-del", id="out")
        while qmp.do("query-block-exports"):
            time.sleep(0.05)
        qmp.do("blockdev-del", **{"node-name": node})
        said = agent.terminate()
        assert "was there" in said and f"QEMU has it already, as {node}" in said
    with fvd.open("file:vm1", read_only=True) as disk:
        assert disk.pread(0, MIB) == b"\7" * MIB
        assert disk.pread(300 * MIB, 65536) == b"\10" * 65536


def test_errors_are_one_line(start: Callable[..., Agent], tmp_path: Path) -> None:
    fvd.provision("file:vm1", "2G")
    words = ["file:vm1", "--size", "1G", "--socket", "vm1.nbd"]
    done = subprocess.run([sys.executable, str(AGENT), *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == fvd.Conflict.exit_code
    assert done.stderr.startswith("agent: ") and done.stderr.count("\n") == 1


# --- The volume group --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def agent_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_example", AGENT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vgextend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vgextend that writes down its arguments, and refuses /dev/used."""
    script = f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nif [ "$2" = /dev/used ]; then echo it is used >&2; exit 5; fi\n'
    (tmp_path / "vgextend").write_text(script)
    (tmp_path / "vgextend").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


def watch(module: ModuleType, spares: list[str], *events: tuple[EventKind, float]) -> None:
    async def told() -> AsyncIterator[fvd.Event]:
        for number, (kind, when) in enumerate(events, 1):
            yield fvd.Event(kind, "vg0/vm1", number, when, 5 << 30, 1 << 30, group="vg0", group_free_bytes=0)

    asyncio.run(module.watch(told(), spares))


def test_a_low_group_gets_a_spare_device(agent_module: ModuleType, vgextend: Path) -> None:
    """One for one shortage: what was told before it was over asks for no second one."""
    spares = ["/dev/sdc", "/dev/sdd"]
    now = time.time()
    watch(agent_module, spares, ("extend_done", now), ("group_low", now), ("group_full", now), ("group_low", now + 3600))
    assert vgextend.read_text() == "vg0 /dev/sdc\nvg0 /dev/sdd\n"
    assert spares == []


def test_a_device_that_is_refused(agent_module: ModuleType, vgextend: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch(agent_module, ["/dev/used", "/dev/sdc"], ("group_full", time.time()))
    assert vgextend.read_text() == "vg0 /dev/used\nvg0 /dev/sdc\n"
    assert "/dev/used cannot be added: it is used" in caplog.text


def test_no_spare_device(agent_module: ModuleType, vgextend: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch(agent_module, [], ("group_full", time.time()))
    assert vgextend.read_text() == ""
    assert "an administrator must add some" in caplog.text


def test_failed_storage_ends_the_agent(agent_module: ModuleType) -> None:
    with pytest.raises(fvd.DeviceError):
        watch(agent_module, [], ("storage_error", time.time()), ("closed", time.time()))
