# SPDX-License-Identifier: Apache-2.0
"""A guest's memory for each test; it ends with the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guest_model import Memory


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()
