# SPDX-License-Identifier: Apache-2.0
"""SHA-256 for names that are made of other names. The interpreter's own: hashlib brings all of OpenSSL along, which an idle server must
not hold."""

from __future__ import annotations

from importlib import import_module


def sha256(data: bytes) -> bytes:
    for name in ("_sha2", "_sha256", "hashlib"):  # since Python 3.12, before that, and where neither is
        try:
            digest: bytes = import_module(name).sha256(data).digest()
        except ImportError:
            continue
        return digest
    raise AssertionError("an interpreter without SHA-256")
