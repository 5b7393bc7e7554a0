# SPDX-License-Identifier: Apache-2.0
"""What fvd makes of the answers of lvm2 in each version that is supported: those in `recorded/` were given by real ones, in guests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lvm2_story import RECORDED, told_again

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_the_same_comes_of_it(path: Path) -> None:
    told_again(json.loads(path.read_text()))


def test_both_versions_are_there() -> None:
    assert {path.stem for path in RECORDED.glob("*.json")} >= {"lvm2-2.03.16", "lvm2-2.03.31"}
