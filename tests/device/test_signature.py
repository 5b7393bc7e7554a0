# SPDX-License-Identifier: Apache-2.0
"""fvd.device.signature: foreign file systems are seen and wiped, and a machine that cannot look says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from loops import loop_device, run, sparse

from fvd.device import signature as signature_module
from fvd.device.claim import claim
from fvd.device.node import open_node
from fvd.device.signature import find_signatures, wipe_signatures
from fvd.errors import DeviceError, Timeout, Unsupported

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sparse(tmp_path / "a file", 16 * MIB)


def test_nothing_is_found_in_zeros(file: Path) -> None:
    assert find_signatures(file) == []
    assert wipe_signatures(file) == []


def test_ext4(file: Path) -> None:
    run("mkfs.ext4", "-q", "-L", "my disk", file)
    (found,) = find_signatures(file)
    assert (found.type, found.offset_bytes, found.label) == ("ext4", 1080, "my disk")
    assert "ext4 'my disk'" in str(found)


def test_the_open_descriptor_is_looked_at_not_the_name(file: Path) -> None:
    run("mkswap", file)
    with open_node(file) as node:
        file.rename(file.with_name("elsewhere"))
        sparse(file, MIB)
        assert [found.type for found in find_signatures(node)] == ["swap"]


def test_a_device_that_is_ours_is_wiped(file: Path) -> None:
    with loop_device(file) as device:
        run("mkfs.ext4", "-q", device)
        with open_node(device) as node:
            node.pwrite(32768, b"\1CD001\1".ljust(4096, b"\0"))  # one that util-linux believes without a checksum, whatever its version
        # As provision does it: the device is held with O_EXCL meanwhile.
        with claim(device):
            assert [found.type for found in wipe_signatures(device)] == ["ext4", "iso9660"]
        assert find_signatures(device) == []


def test_a_machine_without_wipefs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature_module, "_PROGRAM_PATH", "/nowhere")
    with pytest.raises(Unsupported, match="install util-linux"):
        find_signatures(file)


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("exec sleep 30", Timeout, "did not answer"),
        ("echo no such thing >&2; exit 1", DeviceError, "no such thing"),
        ("echo surprise", Unsupported, "does not know"),
        ('echo \'{"signatures": [{"kind": 1}]}\'', Unsupported, "does not know"),
    ],
)
def test_a_wipefs_that_misbehaves(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type[Exception], words: str
) -> None:
    program = tmp_path / "wipefs"
    program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(signature_module, "_PROGRAM_PATH", str(tmp_path))
    with pytest.raises(kind, match=words):
        find_signatures(file, timeout_seconds=0.3 if kind is Timeout else 10)


def test_a_mark_that_cannot_be_wiped_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "wipefs"
    program.write_text('#!/bin/sh\necho \'{"signatures": [{"offset": "0x438", "type": "ext4", "label": null, "uuid": null}]}\'\n')
    program.chmod(0o755)
    monkeypatch.setattr(signature_module, "_PROGRAM_PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="still carries ext4"):
        wipe_signatures(file)
