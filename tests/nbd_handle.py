# SPDX-License-Identifier: Apache-2.0
"""libnbd's own client, connected; without it the tests that ask for one are skipped."""

from __future__ import annotations

from typing import Any

import pytest

nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")


def connect(uri: str) -> Any:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle
