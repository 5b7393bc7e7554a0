# SPDX-License-Identifier: Apache-2.0
"""Seeded bugs for tests: the checked build has them, a release contains none; `make test` runs both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fvd._core import Bug
from fvd.engine import _engine

needs_bugs = pytest.mark.skipif(not _engine.SEEDED_BUGS, reason="a release build contains no seeded bugs; the checked build runs this")


@contextmanager
def seeded(bug: Bug) -> Iterator[None]:
    """One rule is taken away for a while."""
    _engine.seed_bug(bug)
    try:
        yield
    finally:
        _engine.seed_bug(0)
