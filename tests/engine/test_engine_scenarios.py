"""Every directed scenario holds on the engine as it is."""

import pytest
from scenarios import DIRECTED


@pytest.mark.parametrize("bug", sorted(DIRECTED))
def test_rule_is_kept(bug: int) -> None:
    DIRECTED[bug]()
