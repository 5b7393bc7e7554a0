# SPDX-License-Identifier: Apache-2.0
"""What a user means by a base and its format: a path from here or a URI, and which of the superblock's formats that is.

Works on names alone: what the base holds is `images.py`'s.
"""

from __future__ import annotations

import os

from fvd.errors import InvalidArgument, quoted
from fvd.format.locator import NBD_SCHEMES, BaseFormat, check_locator, scheme_of
from fvd.modes import BASE_FORMATS


def parse_format(name: str | None) -> BaseFormat | None:
    """The format that a user named; None: none was named. Raises InvalidArgument."""
    if name is None:
        return None
    if name not in BASE_FORMATS:
        raise InvalidArgument(f"base format {quoted(name)}: choose one of {', '.join(BASE_FORMATS)}")
    return BaseFormat[name.upper()]


def parse_locator(name: str | os.PathLike[str], stated: BaseFormat | None) -> tuple[str, BaseFormat | None]:
    """The locator for a superblock, and its format: None for a path of which none was stated, so that its contents have to be looked at.

    Raises InvalidArgument: what no superblock may name, or a URI that leaves its format open.
    """
    text = os.fspath(name)
    if not isinstance(text, str):
        raise InvalidArgument(f"the base {quoted(text)} must be text, not bytes")
    scheme = None if isinstance(name, os.PathLike) else scheme_of(text)
    if scheme is None:
        # Links stay as the user named them.
        path = os.path.abspath(text)  # noqa: PTH100
        check_locator(path, BaseFormat.RAW if stated is None else stated)
        return path, stated
    if scheme in NBD_SCHEMES:
        base_format = BaseFormat.NBD if stated is None else stated
    elif stated is BaseFormat.RAW:
        base_format = BaseFormat.REMOTE_RAW
    elif stated is None:
        # An unknown scheme is the nearer fault; a file of that name is ./NAME.
        check_locator(text, BaseFormat.REMOTE_RAW)
        raise InvalidArgument(
            f"the base {text} needs its format (--base-format raw, or qcow2, ...): nothing is concluded from its contents"
        )
    else:
        base_format = stated
    check_locator(text, base_format)
    return text, base_format
