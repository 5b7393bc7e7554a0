"""Names of files: made, linked, replaced, removed, made durable. What lies behind a name is node.py's. Knows no disk format."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fvd.device.node import Identity, identity_of, sync_descriptor, sync_directory, typed_errors


def exists(path: str) -> bool:
    """Whether something has this name; a symbolic link that leads nowhere has not."""
    return Path(path).exists()


def leads_to_device(path: str) -> bool:
    """Whether the name leads to a block device now."""
    return Path(path).is_block_device()


def leads_to_file(path: str) -> bool:
    """Whether the name leads to a regular file now."""
    return Path(path).is_file()


def follow(path: str) -> str:
    """The path with every symbolic link followed, as far as there is something to follow."""
    return os.path.realpath(path)


def identity(path: str) -> Identity | None:
    """What the name leads to; None: nothing that can be reached."""
    try:
        return identity_of(Path(path).stat())
    except OSError:
        return None


def publish(path: str, target: str) -> None:
    """Gives the file at `path` the name `target`, durably, and takes `path` away. Raises FileExistsError if `target` is taken.

    A crash in between leaves both names.
    """
    try:
        os.link(path, target)  # unlike a rename, this never takes a name that somebody has
    except FileExistsError:
        raise
    except OSError as error:
        with typed_errors("naming", target):
            raise error
    Path(path).unlink()
    sync_directory(Path(target).parent)


def write_new(path: str, content: bytes, *, mode: int) -> None:
    """Makes a file of this name with this content, which is durable; the name is when `replace` has given it a better one.

    Nothing is followed: who may write in its directory cannot lead it elsewhere. Raises NoSpace, PermissionDenied, NotFound, DeviceError.
    """
    with typed_errors("writing", path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            sync_descriptor(descriptor, path)


def replace(path: str, target: str) -> None:
    """As `publish`, in place of what has the name `target` now: at every moment one of the two has it."""
    with typed_errors("naming", target):
        Path(path).replace(target)
    sync_directory(Path(target).parent)


def remove(path: str) -> None:
    """Takes the name away, durably. Absent is fine."""
    with typed_errors("removing", path), contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
        sync_directory(Path(path).parent)
