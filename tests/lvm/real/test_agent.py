# SPDX-License-Identifier: Apache-2.0
"""examples/agent.py on a real volume group: a guest's writes outgrow the group, the agent adds a device, and they go on by themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qemu_running import export, storage_daemon
from real_devices import MIB, READY_SECONDS, Group, run, size_bytes

import fvd

AGENT = Path(__file__).resolve().parents[3] / "examples" / "agent.py"


def test_a_group_that_fills_under_a_guest(make_group: Callable[..., Group], spare_device: str, tmp_path: Path) -> None:
    group = make_group(size=512 * MIB)
    volume = f"{group.name}/vm1"
    log = tmp_path / "agent.log"
    words = [volume, "--size", "4G", "--grow-step", "128M", "--socket", str(tmp_path / "vm1.nbd"), "--qmp", str(tmp_path / "agent.qmp")]
    second_monitor = ["--chardev", f"socket,id=agent,path={tmp_path}/agent.qmp,server=on,wait=off", "--monitor", "agent"]
    with storage_daemon(tmp_path, *second_monitor) as qmp, log.open("w") as stderr:
        words += ["--spare", spare_device]
        agent = subprocess.Popen([sys.executable, str(AGENT), *words], stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert agent.stdout is not None and agent.stdout.readline().startswith("ready "), log.read_text()
            [node] = [node["node-name"] for node in qmp.do("query-named-block-nodes") if node["drv"] == "nbd"]
            uri = export(qmp, node, tmp_path / "out.sock")
            # Half as much again as the group has; no request of it fails.
            pieces = [f"-P 7 {start}M 64M" for start in range(0, 768, 64)]
            run("qemu-io", "-f", "raw", *(word for piece in pieces for word in ("-c", f"write {piece}")), "-c", "flush", uri)
            run("qemu-io", "-f", "raw", *(word for piece in pieces for word in ("-c", f"read {piece}")), uri)
            assert size_bytes(group.path("vm1")) >= 768 * MIB
            qmp.do("block-export-del", id="out", mode="hard")
            while qmp.do("query-block-exports"):
                pass
            qmp.do("blockdev-del", **{"node-name": node})
            agent.terminate()
            assert agent.wait(READY_SECONDS) == 0, log.read_text()
        finally:
            group.devices = run("vgs", "--noheadings", "-o", "pv_name", group.name).split()
            agent.kill()
            agent.wait()
    said = log.read_text()
    print(said)
    assert said.count(f"extended by {spare_device}") == 1 and "0 spare devices left" in said
    assert "group_low" in said or "group_full" in said
    assert spare_device in group.devices
    row = group.volume("vm1")
    assert row is not None and row["lv_active"] == ""
    assert fvd.check(volume).clean
