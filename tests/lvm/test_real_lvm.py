# SPDX-License-Identifier: Apache-2.0
"""Runs each test file of `real/` on a machine with real device-mapper, udev and lvm2, as one test of this machine's run.

That machine is a User-Mode Linux guest, or with FVD_REAL_LVM_NATIVE=1 this one: as root, on groups and loop devices that the tests make.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from machines import NATIVE, REAL, machine, require_machine

# Its story runs on Debian 13 in every run, and what both versions answered to it is played again (test_lvm2_recorded.py).
IN_THE_LONG_RUN = {"test_lvm2.py"}
FILES = [
    pytest.param(path.name, marks=pytest.mark.long if path.name in IN_THE_LONG_RUN else (), id=path.name)
    for path in sorted(REAL.glob("test_*.py"))
]

pytestmark = [pytest.mark.release_only, pytest.mark.slow]


@pytest.mark.parametrize("name", FILES)
def test_on_a_real_machine(name: str, tmp_path: Path) -> None:
    require_machine()
    report = tmp_path / "report.xml"
    # The guest's memory: what the tests keep in files there is as quick as it can be, and gone with the guest.
    where = [] if NATIVE else ["--basetemp=/dev/shm/pytest"]
    with machine(tmp_path) as real:
        real.run("-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=5", f"--junitxml={report}", *where, REAL / name)
    cases = list(ET.parse(report).iter("testcase"))
    skipped = [f"{case.get('name')}: {skip.get('message')}" for case in cases for skip in case.iter("skipped")]
    assert len(cases) > len(skipped), f"nothing in {name} ran: {'; '.join(skipped) or 'no tests'}"
    if skipped:
        pytest.skip(f"{len(cases) - len(skipped)} passed, {len(skipped)} skipped inside: {'; '.join(skipped)}")
