# SPDX-License-Identifier: Apache-2.0
"""Where to listen, as people write it. Pure text: resolves no names."""

from __future__ import annotations

from fvd.errors import InvalidArgument, quoted

DEFAULT_HOST = "127.0.0.1"  # needs no resolver


def parse_listen(text: str) -> tuple[str, int]:
    """``localhost:10809``, ``[::1]:10809``, ``:10809`` (the loopback). Port 0: the system chooses one. Raises InvalidArgument."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in host and not bracketed):
        raise InvalidArgument(f"{quoted(text)} is not HOST:PORT; write for example localhost:10809 or [::1]:10809")
    return (host[1:-1] if bracketed else host) or DEFAULT_HOST, int(port)
