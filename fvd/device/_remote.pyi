# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator

from fvd.device._queue import Source

class Remote(Source):
    """A read-only NBD export: at a URI, or of a server that is started for it and ends with the connection.

    open() first; then pread() and zero_extents() until it is attached to a queue; then the queue's operations. Ended by close().
    """

    def __init__(
        self,
        *,
        uri: str | None = None,
        command: list[str] | None = None,
        timeout_seconds: float = 30.0,
        name: str = "",
        inherited: int = -1,
        prepare: Callable[[], list[str]] | None = None,
    ) -> None: ...
    @property
    def uri(self) -> str | None: ...
    @property
    def command(self) -> list[str] | None: ...
    @property
    def name(self) -> str: ...
    @property
    def timeout_seconds(self) -> float: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def trouble(self) -> str:
        """Why there is no connection; empty while there is one."""

    @property
    def connected(self) -> bool: ...
    @property
    def where(self) -> str: ...
    def open(self) -> None: ...
    def pread(self, offset_bytes: int, length_bytes: int) -> bytes: ...
    def zero_extents(self) -> Iterator[tuple[int, int]]: ...
    def close(self) -> None: ...
