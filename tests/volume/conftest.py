# SPDX-License-Identifier: Apache-2.0
"""What many of these tests stand on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lvm_machine import Machine, simulated_lvm


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """lvm2, simulated at its last call, over loop devices."""
    with simulated_lvm(tmp_path, monkeypatch) as found:
        yield found
