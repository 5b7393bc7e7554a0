# SPDX-License-Identifier: Apache-2.0
"""The superblock: one page that says what the disk is (FORMAT.md section 4), to and from bytes.

Pure: the caller reads and writes the pages. What comes from storage may be anything; decoding it raises only FvdError.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from fvd import _core
from fvd.errors import Corrupt, InvalidArgument, NotFound, Unsupported, quoted
from fvd.format.geometry import PAGE_BYTES, Geometry, Layout, Placement
from fvd.format.locator import LOCATOR_BYTES_MAX as LOCATOR_BYTES_MAX
from fvd.format.locator import BaseFormat as BaseFormat
from fvd.format.locator import check_locator
from fvd.format.records import Record, Row

SUPERBLOCK_BYTES = PAGE_BYTES
SLOT_OFFSETS_BYTES = (0, 524288)
MAGIC = b"FVDISK\r\n"
VERSION = 1
UUID_BYTES = 16
KNOWN_INCOMPATIBLE_FEATURES = 0
COPY_ON_READ = 1
PREFETCH = 2
KNOWN_COMPATIBLE_FEATURES = COPY_ON_READ | PREFETCH
PENDING_LOG = 1
POSSIBLE_LOSS = 2
KNOWN_AUTOCLEAR_FEATURES = PENDING_LOG | POSSIBLE_LOSS
ID_BYTES = 16
LOG_PATH_BYTES_MAX = 256
_U64_END = 1 << 64

SUPERBLOCK = Record(
    ("magic", "V8"),
    ("checksum", "<u4"),
    ("version", "<u4"),
    ("generation", "<u8"),
    ("uuid", "V16"),
    ("compatible_features", "<u8"),
    ("incompatible_features", "<u8"),
    ("autoclear_features", "<u8"),
    ("virtual_size_bytes", "<u8"),
    ("block_size_bytes", "<u4"),
    ("chunk_size_bytes", "<u4"),
    ("grow_step_bytes", "<u8"),
    ("journal_offset_bytes", "<u8"),
    ("journal_size_bytes", "<u8"),
    ("bitmap_offset_bytes", "<u8"),
    ("bitmap_size_bytes", "<u8"),
    ("table_offset_bytes", "<u8"),
    ("table_size_bytes", "<u8"),
    ("data_offset_bytes", "<u8"),
    ("max_storage_size_bytes", "<u8"),
    ("layout", "u1"),
    ("placement", "u1"),
    ("base_format", "u1"),
    ("reserved_a", "V1"),
    ("base_locator_size", "<u4"),
    ("base_size_bytes", "<u8"),
    ("created_seconds", "<u8"),
    ("log_boot", f"V{ID_BYTES}"),
    ("log_host", f"V{ID_BYTES}"),
    ("loss_seconds", "<u8"),
    ("loss_reason", "<u4"),
    ("log_path_size", "<u4"),
    ("reserved_b", "V288"),
    ("base_locator", f"V{LOCATOR_BYTES_MAX}"),
    ("log_path", f"V{LOG_PATH_BYTES_MAX}"),
    ("reserved_c", "V256"),
)
_CHOSEN = ("virtual_size_bytes", "block_size_bytes", "chunk_size_bytes", "journal_size_bytes", "grow_step_bytes")
_DERIVED = (
    "journal_offset_bytes",
    "bitmap_offset_bytes",
    "bitmap_size_bytes",
    "table_offset_bytes",
    "table_size_bytes",
    "data_offset_bytes",
    "max_storage_size_bytes",
)
_FEATURES = ("compatible_features", "incompatible_features", "autoclear_features")
_RESERVED = ("reserved_a", "reserved_b", "reserved_c")
_OF_THE_LOG = ("log_boot", "log_host", "log_path_size", "log_path")
_OF_THE_LOSS = ("loss_seconds", "loss_reason")
_CHECKSUM_OFFSET = 8

if SUPERBLOCK.itemsize != SUPERBLOCK_BYTES:
    raise ImportError(f"the superblock has {SUPERBLOCK.itemsize} bytes, not {SUPERBLOCK_BYTES}")


@dataclass(frozen=True, slots=True)
class BaseReference:
    """The image that absent blocks are read from. The size is fixed at provision. Raises InvalidArgument."""

    locator: str
    size_bytes: int
    format: BaseFormat = BaseFormat.RAW

    def __post_init__(self) -> None:
        if not isinstance(self.format, BaseFormat) or self.format is BaseFormat.NONE:
            raise InvalidArgument(f"a base of format {quoted(self.format)} does not exist")
        check_locator(self.locator, self.format)
        if not 0 <= self.size_bytes < _U64_END:
            raise InvalidArgument(f"the base's size {self.size_bytes} is not possible")


@dataclass(frozen=True, slots=True)
class LogRecord:
    """That the disk is open for writing, or was when its server died: where the log of its pending changes is. Raises InvalidArgument."""

    boot: bytes  # of the kernel that keeps the log
    host: bytes
    path: str  # "": none could be made

    def __post_init__(self) -> None:
        if len(self.boot) != ID_BYTES or len(self.host) != ID_BYTES:
            raise InvalidArgument(f"a boot and a host are known by {ID_BYTES} bytes")
        if self.path and not (self.path.startswith("/") and self.path.isprintable()):
            raise InvalidArgument("the log's path is not an absolute one")
        if len(self.path.encode()) > LOG_PATH_BYTES_MAX:
            raise InvalidArgument(f"the log's path has more than {LOG_PATH_BYTES_MAX} bytes")


class LossReason(IntEnum):
    """Why acknowledged writes may be gone."""

    FLUSH_FAILED = 1  # and the server died before the disk was opened again
    FLUSH_UNHEARD = 2  # a flush was under way when the server died: whether the device failed it nobody heard
    LOG_MISSING = 3  # or not believed: the disk was opened without it, as somebody asked


@dataclass(frozen=True, slots=True)
class LossRecord:
    """That acknowledged writes may be gone, until an administrator says that it was seen. Raises InvalidArgument."""

    seconds: int  # Unix time of the open that found it
    reason: LossReason

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < _U64_END:
            raise InvalidArgument(f"the time {self.seconds} does not fit in 64 bits")


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a disk is. Raises InvalidArgument."""

    geometry: Geometry
    uuid: bytes
    generation: int
    base: BaseReference | None
    created_seconds: int
    compatible_features: int = 0
    incompatible_features: int = 0
    autoclear_features: int = 0
    log: LogRecord | None = None
    loss: LossRecord | None = None

    def __post_init__(self) -> None:
        said = PENDING_LOG * (self.log is not None) | POSSIBLE_LOSS * (self.loss is not None)
        if self.autoclear_features & KNOWN_AUTOCLEAR_FEATURES != said:
            raise InvalidArgument("the autoclear features contradict what the superblock says of the log and of losses")
        if len(self.uuid) != UUID_BYTES:
            raise InvalidArgument(f"a UUID has {UUID_BYTES} bytes, not {len(self.uuid)}")
        if not 1 <= self.generation < _U64_END:
            raise InvalidArgument(f"generation {self.generation} is not possible; the first is 1")
        for name in ("created_seconds", *_FEATURES):
            if not 0 <= getattr(self, name) < _U64_END:
                raise InvalidArgument(f"{name} {getattr(self, name)} does not fit in 64 bits")

    @property
    def copy_on_read(self) -> bool:
        """Whether opens that do not say otherwise keep what the guest reads from the base."""
        return bool(self.compatible_features & COPY_ON_READ)

    @property
    def prefetch(self) -> bool:
        """Whether opens that do not say otherwise copy the whole base in the background."""
        return bool(self.compatible_features & PREFETCH)

    @property
    def next_generation(self) -> int:
        """Raises Corrupt: there is none, for somebody has written the last one."""
        if self.generation + 1 >= _U64_END:
            raise Corrupt(f"generation {self.generation} is the last that there can be, and no program counts so far: it is forged")
        return self.generation + 1

    def renewed(self, *, log: LogRecord | None, loss: LossRecord | None) -> Superblock:
        """The next generation, with these records and without autoclear features that are not known: what they vouch for may change."""
        features = PENDING_LOG * (log is not None) | POSSIBLE_LOSS * (loss is not None)
        return replace(self, generation=self.next_generation, autoclear_features=features, log=log, loss=loss)

    @property
    def slot(self) -> int:
        """Which of the two slots this generation lives in."""
        return self.generation % 2


def encode(superblock: Superblock) -> bytes:
    """The page to write at ``SLOT_OFFSETS_BYTES[superblock.slot]``. Raises InvalidArgument or Unsupported;
    what it returns decodes to the same superblock."""
    geometry = superblock.geometry
    row = SUPERBLOCK.empty()
    row["magic"] = MAGIC
    row["version"] = VERSION
    row["generation"] = superblock.generation
    row["uuid"] = superblock.uuid
    for name in _FEATURES:
        row[name] = getattr(superblock, name)
    for name in _CHOSEN + _DERIVED:
        row[name] = getattr(geometry, name)
    row["layout"] = int(geometry.layout)
    row["placement"] = int(geometry.placement)
    row["created_seconds"] = superblock.created_seconds
    if superblock.base is not None:
        locator = superblock.base.locator.encode()
        row["base_format"] = int(superblock.base.format)
        row["base_locator_size"] = len(locator)
        row["base_size_bytes"] = superblock.base.size_bytes
        row["base_locator"] = locator
    if superblock.log is not None:
        path = superblock.log.path.encode()
        row["log_boot"], row["log_host"] = superblock.log.boot, superblock.log.host
        row["log_path_size"] = len(path)
        row["log_path"] = path
    if superblock.loss is not None:
        row["loss_seconds"], row["loss_reason"] = superblock.loss.seconds, int(superblock.loss.reason)
    raw = SUPERBLOCK.write(row)
    SUPERBLOCK.put(raw, "checksum", _core.checksum(superblock.uuid, SLOT_OFFSETS_BYTES[superblock.slot], raw, _CHECKSUM_OFFSET))
    encoded = bytes(raw)
    if decode(encoded, superblock.slot) != superblock:
        raise InvalidArgument("the superblock does not survive its own encoding")
    return encoded


def decode(page: bytes, slot: int) -> Superblock:
    """Read the page of one slot (0 or 1). Raises NotFound, Corrupt or Unsupported."""
    if len(page) != SUPERBLOCK_BYTES or slot not in (0, 1):
        raise InvalidArgument(f"superblock slot {slot} with {len(page)} bytes")
    where = f"superblock slot {slot}"
    page = bytes(page)
    row = SUPERBLOCK.read(page)
    if row["magic"] != MAGIC:
        raise NotFound(f"{where} holds no fvd superblock")
    uuid = row["uuid"]
    # Before the version: rot must not look like a format of the future.
    if row["checksum"] != _core.checksum(uuid, SLOT_OFFSETS_BYTES[slot], page, _CHECKSUM_OFFSET):
        raise Corrupt(f"{where}: checksum mismatch")
    if row["version"] != VERSION:
        raise Unsupported(f"{where}: format version {row['version']}; this program knows version {VERSION}")
    unknown = row["incompatible_features"] & ~KNOWN_INCOMPATIBLE_FEATURES
    if unknown:
        raise Unsupported(f"{where}: unknown incompatible features {unknown:#x}; a newer program wrote this disk")
    # Before the rest: what a locator looks like is up to its format.
    if row["base_format"] not in tuple(BaseFormat):
        raise Unsupported(f"{where}: unknown base format {row['base_format']}; a newer program wrote this disk")
    try:
        return _interpret(row, uuid, slot)
    except InvalidArgument as error:
        raise Corrupt(f"{where}: {error}") from error


def _interpret(row: Row, uuid: bytes, slot: int) -> Superblock:
    if row["generation"] % 2 != slot:
        raise InvalidArgument(f"generation {row['generation']} does not belong here")
    if row["layout"] not in tuple(Layout) or row["placement"] not in tuple(Placement):
        raise InvalidArgument(f"layout {row['layout']} or placement {row['placement']} does not exist")
    chosen = {name: row[name] for name in _CHOSEN}
    geometry = Geometry(**chosen, layout=Layout(row["layout"]), placement=Placement(row["placement"]))
    for name in _DERIVED:
        if row[name] != getattr(geometry, name):
            raise InvalidArgument(f"{name} is {row[name]}, but the sizes give {getattr(geometry, name)}")
    superblock = Superblock(
        geometry=geometry,
        uuid=uuid,
        generation=row["generation"],
        base=_interpret_base(row),
        created_seconds=row["created_seconds"],
        log=_interpret_log(row),
        loss=_interpret_loss(row),
        **{name: row[name] for name in _FEATURES},
    )
    # A feature that this program does not know may have given a meaning to reserved bytes.
    unknown = superblock.compatible_features & ~KNOWN_COMPATIBLE_FEATURES | superblock.autoclear_features & ~KNOWN_AUTOCLEAR_FEATURES
    if not unknown:
        of_the_log = () if superblock.log is not None else _OF_THE_LOG
        of_the_loss = () if superblock.loss is not None else _OF_THE_LOSS
        for name in (*_RESERVED, *of_the_log, *of_the_loss):
            if row[name] != SUPERBLOCK.empty()[name]:
                raise InvalidArgument(f"{name} is not zero")
    return superblock


def _interpret_log(row: Row) -> LogRecord | None:
    if not row["autoclear_features"] & PENDING_LOG:
        return None
    padded, size = row["log_path"], row["log_path_size"]
    if size > LOG_PATH_BYTES_MAX or padded[size:].strip(b"\0"):
        raise InvalidArgument(f"log_path_size is {size}, which does not fit the path")
    try:
        return LogRecord(row["log_boot"], row["log_host"], padded[:size].decode())
    except UnicodeDecodeError as error:
        raise InvalidArgument("the log's path is not UTF-8") from error


def _interpret_loss(row: Row) -> LossRecord | None:
    if not row["autoclear_features"] & POSSIBLE_LOSS:
        return None
    if row["loss_reason"] not in tuple(LossReason):
        raise InvalidArgument(f"loss_reason {row['loss_reason']} does not exist")
    return LossRecord(row["loss_seconds"], LossReason(row["loss_reason"]))


def _interpret_base(row: Row) -> BaseReference | None:
    padded = row["base_locator"]
    size = row["base_locator_size"]
    if size > LOCATOR_BYTES_MAX or padded[size:].strip(b"\0"):
        raise InvalidArgument(f"base_locator_size is {size}, which does not fit the locator")
    base_format = BaseFormat(row["base_format"])
    if base_format is BaseFormat.NONE:
        if size or row["base_size_bytes"]:
            raise InvalidArgument("a base's name or size without a base")
        return None
    try:
        locator = padded[:size].decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument("the base's name is not UTF-8") from error
    return BaseReference(locator, row["base_size_bytes"], base_format)


def choose(page0: bytes, page1: bytes) -> Superblock:
    """The superblock in force, from the pages of both slots. Raises NotFound (no fvd disk), Unsupported or Corrupt."""
    newest: Superblock | None = None
    newest_unsupported: tuple[int, Unsupported] | None = None
    damaged: Corrupt | None = None
    missing: NotFound | None = None
    for slot, page in enumerate((page0, page1)):
        try:
            superblock = decode(page, slot)
        except Unsupported as error:
            generation = SUPERBLOCK.read(page)["generation"]
            if newest_unsupported is None or generation > newest_unsupported[0]:
                newest_unsupported = (generation, error)
        except Corrupt as error:
            damaged = error
        except NotFound as error:
            missing = error
        else:
            if newest is None or superblock.generation > newest.generation:
                newest = superblock
    # An intact superblock of a newer program is in force: falling back to an older generation would undo what that program did.
    if newest_unsupported is not None and (newest is None or newest_unsupported[0] > newest.generation):
        raise newest_unsupported[1]
    if newest is not None:
        return newest
    raise damaged or missing or NotFound("no fvd superblock")
