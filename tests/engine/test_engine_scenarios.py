"""Every directed scenario holds on the engine as it is."""

from collections.abc import Callable

import pytest
from scenarios import DIRECTED, FAULTS_ONCE_FOUND


@pytest.mark.parametrize("bug", sorted(DIRECTED))
def test_rule_is_kept(bug: int) -> None:
    DIRECTED[bug]()


@pytest.mark.parametrize("scenario", FAULTS_ONCE_FOUND, ids=lambda scenario: scenario.__name__)
def test_fault_stays_away(scenario: Callable[[], None]) -> None:
    scenario()
