# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv attach-info``: what it prints is what QEMU's programs open and what libvirt's schema allows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fvd_commands import Done, Server
from qemu_running import export, running, storage_daemon

from fvd.api.attach import NODE_NAME_BYTES, RECONNECT_DELAY_SECONDS, AttachInfo, describe, keyval, parse_uri
from fvd.api.types import Base, Info
from fvd.cli.main import main
from fvd.errors import InvalidArgument

pytestmark = pytest.mark.pure

FvdLv = Callable[..., Done]
Serving = Callable[..., AbstractContextManager[Server]]

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMAS = Path("/usr/share/libvirt/schemas")
MIB = 1 << 20
# Commas for QEMU, quotes and $ for shells, <&'"> for XML, % for URIs, = for keys.
ODD = 'a, b\'s <&"$HOME"> 100%=ü'


def run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def served(**changes: Any) -> Info:
    """A served disk, as far as attach-info is concerned."""
    numbers: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(Info) if field.default is dataclasses.MISSING}
    own = {"volume": "file:/srv/vm1", "uuid": "42db7f96-62ae-4cce-8ebc-094dd536eeeb", "uri": "nbd+unix:///vm1?socket=/run/vm1.nbd"}
    return Info(**{**numbers, "base": None, **own, **changes})


def by_description(answer: dict[str, Any]) -> str:
    """For QEMU's programs in place of the URI: QEMU 10 reads no & or % in a socket's path there."""
    return f"json:{json.dumps({'driver': 'raw', 'file': answer['blockdev']})}"


def source(found: AttachInfo) -> ElementTree.Element:
    element = ElementTree.fromstring(found.libvirt_xml).find("source")
    assert element is not None
    return element


# --- Text ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "export_name", "server"),
    [
        ("nbd+unix:///vm1?socket=/run/vm1.nbd", "vm1", {"type": "unix", "path": "/run/vm1.nbd"}),
        ("nbd+unix:///?socket=/run/vm1.nbd", "", {"type": "unix", "path": "/run/vm1.nbd"}),
        ("nbd+unix:///a%2Fb%3F%23?socket=/run/a%20b%26c%2B%25.nbd", "a/b?#", {"type": "unix", "path": "/run/a b&c+%.nbd"}),
        ("nbd+unix:///x?socket=/run/a+b", "x", {"type": "unix", "path": "/run/a+b"}),
        ("nbd://localhost:10810/vm1", "vm1", {"type": "inet", "host": "localhost", "port": "10810"}),
        ("nbd://Host.example/vm1", "vm1", {"type": "inet", "host": "Host.example", "port": "10809"}),
        ("nbd://[::1]:10809/vm1", "vm1", {"type": "inet", "host": "::1", "port": "10809"}),
        ("nbd://[2001:db8::7]/vm1", "vm1", {"type": "inet", "host": "2001:db8::7", "port": "10809"}),
    ],
)
def test_uris(uri: str, export_name: str, server: dict[str, str]) -> None:
    assert parse_uri(uri) == (export_name, server)


@pytest.mark.parametrize(
    "uri", ["", "vm1", "nbds://host/x", "nbd+unix:///x", "nbd://host:port/x", "nbd:///x", "nbd://[::1/x", "http://a/b"]
)
def test_what_is_no_uri_of_ours(uri: str) -> None:
    with pytest.raises(InvalidArgument, match="no NBD URI"):
        parse_uri(uri)


def test_the_forms_say_the_same() -> None:
    found = describe(served(), iothread=True)
    blockdev, device = found.qmp[1]["arguments"], found.qmp[2]["arguments"]
    assert blockdev == found.blockdev
    assert device["drive"] == blockdev["node-name"] == "fvd-vm1-42db7f96"
    assert found.qemu_args[1] == f"iothread,id={device['iothread']}" == f"iothread,id={found.qmp[0]['arguments']['id']}"
    assert found.qemu_args[3].split(",") == list(keyval(blockdev))
    assert found.qemu_args[5].split(",") == [device.pop("driver"), *keyval(device)]
    driver = ElementTree.fromstring(found.libvirt_xml).find("driver")
    assert driver is not None
    assert driver.attrib == {
        "name": "qemu",
        "type": "raw",
        "cache": "none",
        "discard": blockdev["discard"],
        "detect_zeroes": blockdev["detect-zeroes"],
        "error_policy": device["werror"],
        "rerror_policy": device["rerror"],
        "iothread": "1",
    }
    reconnect = source(found).find("reconnect")
    assert reconnect is not None
    assert reconnect.attrib == {"delay": str(blockdev["reconnect-delay"])}


@pytest.mark.parametrize(("path", "noted"), [("/run/a%26b", True), ("/run/a%25b", True), ("/run/a%20b%3D", False)])
def test_a_uri_that_qemu_10_refuses_is_noted(path: str, noted: bool) -> None:
    found = describe(served(uri=f"nbd+unix:///a%26%25b?socket={path}"))
    assert any("decodes the path" in note for note in found.notes) == noted
    assert not any("%2" in text for text in [*found.qemu_args, json.dumps(found.qmp), found.libvirt_xml])


def test_a_base_is_a_note_until_it_is_released() -> None:
    base = Base("nbd://images/debian", MIB, "nbd")
    over_a_base = describe(served(base=base))
    assert [note for note in over_a_base.notes if "nbd://images/debian" in note and "--base-timeout" in note]
    assert describe(served(base=base, base_released=True)).notes == describe(served()).notes


def test_tcp_in_xml() -> None:
    found = describe(served(uri="nbd://[::1]:10811/vm1"))
    host = source(found).find("host")
    assert host is not None
    assert host.attrib == {"name": "::1", "port": "10811"}
    assert "server.host=::1,server.port=10811," in found.qemu_args[1]
    assert not any("socket" in note for note in found.notes)
    assert any("every address" in note for note in describe(served(uri="nbd://[::]:10811/vm1")).notes)


def test_read_only() -> None:
    found = describe(served(read_only=True))
    assert found.blockdev["read-only"] is True
    assert "discard" not in found.blockdev and "detect-zeroes" not in found.blockdev
    disk = ElementTree.fromstring(found.libvirt_xml)
    assert disk.find("readonly") is not None
    assert ElementTree.fromstring(describe(served()).libvirt_xml).find("readonly") is None


def test_node_names() -> None:
    """QEMU's rules for them, one disk always the same, two disks of one name never."""
    other = "ffffffff-62ae-4cce-8ebc-094dd536eeeb"
    names = [
        describe(served(volume=volume, uuid=uuid)).blockdev["node-name"]
        for volume in ("file:/x/vm1", "vg0/vm1", "/dev/sdb", f"file:/x/{'long' * 20}", f"file:/{ODD}", "file:/-._", "file:/ü")
        for uuid in (other, served().uuid)
    ]
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", name) and len(name) <= NODE_NAME_BYTES for name in names)
    assert names[0] != names[1] and names[0] == names[2]
    assert names[4] == "fvd-sdb-ffffffff"


def test_what_xml_cannot_hold() -> None:
    found = describe(served(uri="nbd+unix:///vm1?socket=/run/a%0Ab%09c"))
    host = source(found).find("host")
    assert host is not None and host.attrib["socket"] == "/run/a\nb\tc"
    with pytest.raises(InvalidArgument, match="XML"):
        describe(served(uri="nbd+unix:///vm1?socket=/run/%01"))


@pytest.mark.parametrize("target", ["", "vdb'", "sda", "vd1", "vdbcde", "vdb\n"])
def test_targets(target: str) -> None:
    with pytest.raises(InvalidArgument, match="write for example vdb"):
        describe(served(), target=target)


def test_the_delay_outlasts_a_restart_of_the_service() -> None:
    unit = (ROOT / "systemd" / "fvd@.service").read_text()
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    [rest] = re.findall(r"^RestartSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop) + int(rest) + 10 <= RECONNECT_DELAY_SECONDS


# --- The command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(fvd_lv: FvdLv) -> str:
    fvd_lv("provision", f"file:{ODD}", "--size", "1G", "--grow-step", "64M")
    return f"file:{ODD}"


def test_formats(disk: str, fvd_lv: FvdLv, serving: Serving) -> None:
    with serving(disk) as server:
        answer = fvd_lv("attach-info", disk, "--output", "json").json
        assert set(answer) == {"schema_version", *(field.name for field in dataclasses.fields(AttachInfo))}
        assert answer["uri"] == server.uri and answer["export"] == ODD
        assert fvd_lv("attach-info", disk, "--format", "uri").out == f"{server.uri}\n"
        assert shlex.split(fvd_lv("attach-info", disk, "--format", "qemu").out.replace("\\\n", " ")) == answer["qemu_args"]
        lines = fvd_lv("attach-info", disk, "--format", "qmp").out.splitlines()
        assert [json.loads(line) for line in lines] == answer["qmp"]
        assert fvd_lv("attach-info", disk, "--format", "libvirt").out == f"{answer['libvirt_xml']}\n"
        text = fvd_lv("attach-info", disk).out
        for part in (answer["libvirt_xml"], *lines, server.uri, *answer["notes"]):
            assert part in text
        threaded = fvd_lv("attach-info", disk, "--iothread", "--target", "vdq", "--output", "json").json
        assert threaded["qemu_args"][0] == "-object" and "dev='vdq'" in threaded["libvirt_xml"]
        assert "vdb" in fvd_lv("attach-info", disk, "--target", "hda", code=2).err


def test_not_served(disk: str, fvd_lv: FvdLv, workdir: Path) -> None:
    done = fvd_lv("attach-info", disk, code=3)
    assert "is not served" in done.err and done.err.count("\n") == 1
    [(command, setting, name)] = re.findall(r"run (fvd-lv serve .*), or write (VOLUME=.*) into /etc/fvd/(\S+)\.conf and", done.err)
    volume = f"file:{workdir / ODD}"
    assert shlex.split(command) == ["fvd-lv", "serve", volume, "--socket", f"/run/fvd/{name}.nbd"]
    assert shlex.split(setting) == [f"VOLUME={volume}"]
    assert done.err.endswith(f"run systemctl start fvd@{name}\n") and re.fullmatch(r"[\w.-]+", name, re.ASCII)
    answer = json.loads(fvd_lv("attach-info", disk, "--output", "json", code=3).out)
    assert answer["error"]["kind"] == "not_found"
    assert "is not served" not in fvd_lv("attach-info", "file:absent", code=3).err


# --- The real programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["unix", "tcp", "tcp6"])
def attached(request: pytest.FixtureRequest, disk: str, fvd_lv: FvdLv, serving: Serving) -> Any:
    where = {"unix": ["--socket", f"{ODD}.sock"], "tcp": ["--listen", "127.0.0.1:0"], "tcp6": ["--listen", "[::1]:0"]}[request.param]
    with serving(disk, *where) as server:
        yield server, fvd_lv("attach-info", disk, "--output", "json").json


def test_qemu_img_opens_it(attached: tuple[Server, dict[str, Any]]) -> None:
    _, answer = attached
    for words in ([f"json:{json.dumps(answer['blockdev'])}"], ["--image-opts", answer["qemu_args"][1]]):
        assert json.loads(run("qemu-img", "info", "--output=json", *words))["virtual-size"] == 1024 * MIB


def test_qemu_storage_daemon_opens_it(attached: tuple[Server, dict[str, Any]], workdir: Path) -> None:
    """By its command line and by QMP's blockdev-add: what is written through the daemon is in the disk."""
    _, answer = attached
    node = answer["blockdev"]["node-name"]
    for number, words in enumerate(([], ["--blockdev", answer["qemu_args"][1]])):
        with storage_daemon(workdir, *words) as qmp:
            if not words:
                qmp.send(answer["qmp"][0])
            uri = export(qmp, node, workdir / "out.sock")
            run("qemu-io", "-f", "raw", "-c", f"write -P {number + 1} {number}M 1M", "-c", "flush", uri)
        run("qemu-io", "-c", f"read -P {number + 1} {number}M 1M", by_description(answer))


def test_the_guest_waits_for_a_server_that_comes_back(disk: str, fvd_lv: FvdLv, serving: Serving, workdir: Path) -> None:
    # The daemon ends before the second server: without one it would wait for as long as the delay.
    with serving(disk) as first, contextlib.ExitStack() as second, storage_daemon(workdir) as qmp:
        answer = fvd_lv("attach-info", disk, "--output", "json").json
        qmp.send(answer["qmp"][0])
        uri = export(qmp, answer["blockdev"]["node-name"], workdir / "out.sock")
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "flush", uri)
        first.kill()
        waiting = subprocess.Popen(["qemu-io", "-f", "raw", "-c", "read -P 7 0 1M", "-c", "write -P 8 1M 1M", "-c", "flush", uri])
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        second.enter_context(serving(disk))
        assert waiting.wait(60) == 0
        run("qemu-io", "-c", "read -P 7 0 1M", "-c", "read -P 8 1M 1M", by_description(answer))


def test_discards_and_zeros_arrive(disk: str, fvd_lv: FvdLv, serving: Serving, workdir: Path) -> None:
    with serving(disk):
        answer = fvd_lv("attach-info", disk, "--output", "json").json
        with storage_daemon(workdir) as qmp:
            qmp.send(answer["qmp"][0])
            uri = export(qmp, answer["blockdev"]["node-name"], workdir / "out.sock")
            run("qemu-io", "-f", "raw", "-c", "write -P 0 0 16M", "-c", "flush", uri)
            assert fvd_lv("info", disk, "--output", "json").json["mapped_bytes"] == 0, "zeros took storage"
            run("qemu-io", "-f", "raw", "-c", "write -P 7 0 16M", "-c", "flush", uri)
            assert fvd_lv("info", disk, "--output", "json").json["mapped_bytes"] == 16 * MIB
            run("qemu-io", "-f", "raw", "-c", "discard 0 16M", "-c", "flush", uri)
            assert fvd_lv("map", disk, "--length", "16M", "--output", "json").json["extents"][0]["state"] == "zero"


def test_a_read_only_disk(disk: str, fvd_lv: FvdLv, serving: Serving, workdir: Path) -> None:
    with serving(disk, "--read-only"):
        answer = fvd_lv("attach-info", disk, "--output", "json").json
        assert answer["read_only"] is True
        with storage_daemon(workdir, "--blockdev", answer["qemu_args"][1]) as qmp:
            [node] = qmp.do("query-named-block-nodes")
            assert node["ro"] is True


@pytest.mark.parametrize("iothread", [False, True])
def test_qemu_takes_the_command_line(disk: str, fvd_lv: FvdLv, serving: Serving, workdir: Path, iothread: bool) -> None:
    """As pasted into a shell, and again by QMP into a machine that is there."""
    words = ["--iothread"] if iothread else []
    qemu = shlex.split("qemu-system-x86_64 -machine pc,accel=tcg -nodefaults -display none -S -qmp unix:qmp.sock,server=on,wait=off")
    with serving(disk):
        line = fvd_lv("attach-info", disk, *words, "--format", "qemu").out
        with running(["sh", "-c", f"exec {shlex.join(qemu)} {line}"] if shutil.which(qemu[0]) else qemu, workdir / "qmp.sock") as qmp:
            before = qmp.do("query-block")
        with running(qemu, workdir / "qmp.sock") as qmp:
            for command in fvd_lv("attach-info", disk, *words, "--output", "json").json["qmp"]:
                qmp.send(command)
            after = qmp.do("query-block")
    for [device] in (before, after):
        assert device["qdev"].removeprefix("/machine/peripheral/").startswith("fvd-a-b-s")
        image = device["inserted"]
        assert (image["ro"], image["cache"]["direct"], image["detect_zeroes"]) == (False, True, "unmap")
        assert image["image"]["virtual-size"] == 1024 * MIB


@pytest.mark.parametrize("uri", ["nbd+unix:///%3Ca%20b%27s%26%22?socket=/run/%3C%27%22%26%20x", "nbd://[::1]:10811/vm1"])
@pytest.mark.parametrize("read_only", [False, True])
def test_libvirt_allows_the_xml(uri: str, read_only: bool, workdir: Path) -> None:
    schema = SCHEMAS / "storagecommon.rng"
    if shutil.which("virt-xml-validate") is None or not schema.exists():
        pytest.skip("libvirt-clients is not installed")
    xml = describe(served(uri=uri, read_only=read_only), iothread=True).libvirt_xml
    if '<attribute name="delay">' not in schema.read_text():  # libvirt up to 9.0
        xml = re.sub(r"\s*<reconnect delay='\d+'/>", "", xml)
    domain = workdir / "domain.xml"
    domain.write_text(
        "<domain type='kvm'><name>vm</name><memory unit='MiB'>64</memory><iothreads>1</iothreads>"
        f"<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{xml}</devices></domain>"
    )
    run("virt-xml-validate", str(domain), "domain")


# --- vhost-user ----------------------------------------------------------------------------------------------------------------


def test_qemu_takes_vhost_user(disk: str, fvd_lv: FvdLv, serving: Serving, workdir: Path) -> None:
    """As pasted into a shell, and by QMP into a machine with such memory."""
    qemu = shlex.split("qemu-system-x86_64 -machine pc,accel=tcg -nodefaults -display none -S -qmp unix:qmp.sock,server=on,wait=off")
    path = workdir / f"{ODD}.vhost"
    with serving(disk, "--vhost-user", str(path), "--queues", "2"):
        way = fvd_lv("attach-info", disk, "--memory", "64M", "--output", "json").json["vhost_user"]
        assert (way["queues"], way["path"]) == (2, str(path))
        line = fvd_lv("attach-info", disk, "--memory", "64M", "--format", "qemu").out
        for given, commands in ((line, []), (shlex.join(way["qemu_args"][:4]), way["qmp"])):
            with running(["sh", "-c", f"exec {shlex.join(qemu)} {given}"] if shutil.which(qemu[0]) else qemu, workdir / "qmp.sock") as qmp:
                for command in commands:
                    qmp.send(command)
                node = way["qmp"][-1]["arguments"]["id"]
                assert qmp.do("qom-get", path=f"/machine/peripheral/{node}", property="num-queues") == 2
                assert qmp.do("query-memory-size-summary")["base-memory"] == 64 * MIB
                assert fvd_lv("info", disk, "--output", "json").json["guests"] == 1


def test_libvirt_allows_vhost_user(workdir: Path) -> None:
    if shutil.which("virt-xml-validate") is None:
        pytest.skip("libvirt-clients is not installed")
    way = describe(served(vhost_user="/run/<'&.vhost", queues=4)).vhost_user
    assert way is not None
    domain = workdir / "domain.xml"
    domain.write_text(
        f"<domain type='kvm'><name>vm</name><memory unit='MiB'>64</memory>{way.libvirt_memory_xml}"
        f"<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{way.libvirt_xml}</devices></domain>"
    )
    run("virt-xml-validate", str(domain), "domain")
    driver = ElementTree.fromstring(way.libvirt_xml).find("driver")
    assert driver is not None and driver.attrib["queues"] == "4"


def test_which_way_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*words: str, **changes: Any) -> str:
        monkeypatch.setattr("fvd.attach_info", lambda *_, **__: describe(served(**changes)))
        code = main(["attach-info", "file:vm1", *words])
        out, err = capsys.readouterr()
        return out if code == 0 else err

    both = {"vhost_user": "/run/vm1.vhost", "queues": 1}
    assert "vhost-user-blk-pci" in text("--format", "qemu", **both)
    assert "virtio-blk-pci" in text("--format", "qemu", "--over", "nbd", **both)
    assert "blockdev" in text(**both) and "memoryBacking" in text(**both) and "blockdev" not in text("--over", "vhost-user", **both)
    assert text("--over", "nbd", **both) == text()
    assert "is not served by vhost-user" in text("--over", "vhost-user")
    assert "blockdev" not in text(uri="", **both) and "vhost-user-blk-pci" in text("--format", "qemu", uri="", **both)
    assert all("is not served over NBD" in text(*words, uri="", **both) for words in (("--format", "uri"), ("--over", "nbd")))


def test_the_python_api(disk: str, serving: Serving) -> None:
    """Importable from the top, and typed."""
    code = f"import fvd; found = fvd.attach_info({disk!r}); assert isinstance(found, fvd.AttachInfo); print(found.uri)"
    with serving(disk) as server:
        assert run(sys.executable, "-c", code).strip() == server.uri
