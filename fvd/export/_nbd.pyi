# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping, Sequence
from typing import NamedTuple

PAYLOAD_BYTES_MAX: int
ALLOCATION_CONTEXT: int

COMMAND_READ: int
COMMAND_WRITE: int
COMMAND_DISCONNECT: int
COMMAND_FLUSH: int
COMMAND_TRIM: int
COMMAND_CACHE: int
COMMAND_WRITE_ZEROES: int
COMMAND_BLOCK_STATUS: int

COMMAND_FLAG_FUA: int
COMMAND_FLAG_NO_HOLE: int
COMMAND_FLAG_DF: int
COMMAND_FLAG_REQ_ONE: int

STATUS_HOLE: int
STATUS_ZERO: int

TRANSITIONS: Mapping[tuple[int, int], int]

class Command(NamedTuple):
    command: int
    flags: int
    cookie: int
    offset_bytes: int
    length_bytes: int
    error: int
    data: bytes

class NeedData(NamedTuple): ...
class Closed(NamedTuple): ...

class Transmission:
    def __init__(
        self,
        size_bytes: int,
        *,
        minimum_block_bytes: int = 1,
        read_only: bool = False,
        structured: bool = False,
        allocation: bool = False,
    ) -> None: ...
    def receive_data(self, data: bytes) -> None: ...
    def next_event(self) -> Command | NeedData | Closed: ...

def simple_reply(cookie: int, error: int = 0, data: bytes = b"") -> bytes: ...
def data_reply(cookie: int, offset_bytes: int, data: bytes) -> bytes: ...
def hole_reply(cookie: int, offset_bytes: int, length_bytes: int) -> bytes: ...
def error_reply(cookie: int, error: int) -> bytes: ...
def status_reply(cookie: int, extents: Sequence[tuple[int, int]]) -> bytes: ...
def error_of_errno(errno: int) -> int: ...
