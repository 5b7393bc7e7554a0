# SPDX-License-Identifier: Apache-2.0
"""Every directed scenario holds on the engine as it is."""

from collections.abc import Callable

import pytest
from scenarios import DIRECTED, FAULTS_ONCE_FOUND

from fvd._core import Bug


@pytest.mark.parametrize("bug", DIRECTED, ids=lambda bug: bug.name)
def test_rule_is_kept(bug: Bug) -> None:
    DIRECTED[bug]()


@pytest.mark.parametrize("scenario", FAULTS_ONCE_FOUND, ids=lambda scenario: scenario.__name__)
def test_fault_stays_away(scenario: Callable[[], None]) -> None:
    scenario()
