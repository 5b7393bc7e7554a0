# SPDX-License-Identifier: Apache-2.0
"""How QEMU's options and libvirt's XML are written. Pure text: knows no disk."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from fvd.errors import InvalidArgument, quoted

# Without the library's quoteattr, which brings an HTTP client along.
_REFERENCES = str.maketrans({
    "&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;",
})  # fmt: skip
# What XML 1.0 can carry in no way, not even as a reference.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def keyval(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """QEMU's key=value form: nested objects by dotted keys, commas doubled."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from keyval(item, f"{prefix}{key}.")
        else:
            text = ("off", "on")[item] if isinstance(item, bool) else str(item).replace(",", ",,")
            yield f"{prefix}{key}={text}"


def attributes(values: dict[str, str]) -> str:
    """Of an XML element, each with a blank before it."""
    return "".join(f" {name}={_quoted(text)}" for name, text in values.items())


def _quoted(text: str) -> str:
    """An attribute's value in single quotes, as libvirt writes them."""
    return f"'{text.translate(_REFERENCES)}'"


def check_xml(*texts: str) -> None:
    """Raises InvalidArgument for what XML cannot hold."""
    for text in texts:
        if _NOT_XML.search(text):
            raise InvalidArgument(f"{quoted(text)} contains characters that libvirt's XML cannot hold; serve the disk under another name")


def shell_line(words: list[str]) -> str:
    """Pairs of option and value as a shell takes them, over several lines."""
    return " \\\n".join(shlex.join(words[start : start + 2]) for start in range(0, len(words), 2))
