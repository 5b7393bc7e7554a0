# SPDX-License-Identifier: Apache-2.0
"""fvd(5) says what FORMAT.md and the code say: offsets, sizes, names, limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_format_document import of_dtype, tables

from fvd.format import superblock

pytestmark = [pytest.mark.pure, pytest.mark.release_only]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "fvd.5"
MAN1 = PAGE.with_name("fvd-lv.1")
TEXT = PAGE.read_text().replace("\\-", "-")


def table(name: str) -> list[list[str]]:
    """The rows below the heading of one table of the page."""
    body = re.search(rf'^\.\\" {name}: begin\n\.TS\n.*?\n_\n(.*?)\n\.TE\n\.\\" {name}: end$', TEXT, re.MULTILINE | re.DOTALL)
    assert body is not None
    return [line.split("\t") for line in body[1].splitlines()]


def test_the_superblock() -> None:
    told = [(name, int(offset), int(size)) for offset, size, name in table("superblock")]
    assert told == [field for field in of_dtype(superblock.SUPERBLOCK) if not field[0].startswith("reserved")]
    magic = re.search(r"^\.BR \"((?:[0-9A-F]{2} ?){8})\"", TEXT, re.MULTILINE)
    assert magic is not None and bytes.fromhex(magic[1]) == superblock.MAGIC


def test_the_regions() -> None:
    document = {row["region"].partition(" (")[0]: row for row in tables(1)[0]}
    rows = {name: (offset, size) for name, offset, size in table("regions")}
    assert list(rows) == list(document)
    for name, (offset, size) in rows.items():
        said = document[name]["offset"], document[name]["size"].strip("`")
        if offset.isdigit() or said[0].isdigit():
            assert (offset, size) == said
        else:  # a field of the superblock, where FORMAT.md says how it is computed
            assert offset == f"{name}_offset_bytes" and offset in (superblock.SUPERBLOCK.names or ())
    assert [int(rows[f"superblock slot {slot}"][0]) for slot in (0, 1)] == list(superblock.SLOT_OFFSETS_BYTES)


def test_the_limits() -> None:
    told = re.findall(r"\.TP\n\.B (.+)\n(.+)\n", TEXT.partition('.\\" limits: begin')[2].partition('.\\" limits: end')[0])
    assert told == [(row["limit"], row["value"]) for row in tables(2)[0]]


def test_features_and_version() -> None:
    assert f"The version of the format is {superblock.VERSION}." in TEXT
    assert f"{superblock.COPY_ON_READ} copy_on_read, {superblock.PREFETCH} prefetch:" in TEXT
    assert superblock.KNOWN_INCOMPATIBLE_FEATURES == 0 and "None is defined." in TEXT


def test_each_page_names_the_other() -> None:
    assert re.search(r"^\.BR fvd-lv \(1\)", TEXT.partition(".SH SEE ALSO")[2], re.MULTILINE)
    assert re.search(r"^\.BR fvd \(5\)", MAN1.read_text().partition(".SH SEE ALSO")[2], re.MULTILINE)


def test_it_is_well_formed() -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    done = subprocess.run(["groff", "-t", "-man", "-Tutf8", "-ww", str(PAGE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "FORMAT.md" in done.stdout
    assert not [line for line in done.stderr.splitlines() if "fvd.5" in line]


def test_it_is_installed() -> None:
    project = (PAGE.parents[1] / "pyproject.toml").read_text()
    assert '"share/man/man5" = ["docs/fvd.5"]' in project
