# SPDX-License-Identifier: Apache-2.0
"""What the lvm2 that is here answers where something is absent, held, full, foreign, missing; and what fvd makes of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from lvm2_story import told_for_real
from real_devices import Pool


def test_the_story_of_lvm2(pool: Pool) -> None:
    if not Path("/run/uml").exists():
        pytest.skip("it changes /etc/lvm/lvm.conf, which only a guest has to itself")
    with ExitStack() as stack:
        told_for_real([stack.enter_context(pool.disk()) for _ in range(3)])
