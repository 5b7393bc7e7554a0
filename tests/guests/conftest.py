# SPDX-License-Identifier: Apache-2.0
"""What every virtual machine of these tests is made of, made once; and the benchmarks' User-Mode Linux guest, which tests borrow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from qemu_machine import Maker

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("machines"))
