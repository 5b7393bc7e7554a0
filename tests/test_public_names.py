# SPDX-License-Identifier: Apache-2.0
"""Public names stay: what was recorded is there, and what is there was recorded."""

import json

import pytest
from public_names import RECORD, public_names, vanished

pytestmark = pytest.mark.pure


def test_no_public_name_has_vanished() -> None:
    lost = vanished(json.loads(RECORD.read_text()), public_names())
    assert lost == [], "users' scripts and agents rely on these"


def test_every_public_name_is_recorded() -> None:
    new = vanished(public_names(), json.loads(RECORD.read_text()))
    assert new == [], "record them: python tests/public_names.py --write"


def test_what_vanishes_is_seen() -> None:
    before = {"commands": {"info": {"--output": ["json", "text"], "--all": []}}, "events": ["served", "closed"]}
    now = {"commands": {"info": {"--output": ["text"], "--all": ["x"]}}, "events": ["served"]}
    assert vanished(before, now) == ["commands info --output json", "commands info --all: any value", "events closed"]
    assert vanished(before, before) == []
    assert vanished({"a": {"b": "property"}}, {"a": {}}) == ["a b"]
