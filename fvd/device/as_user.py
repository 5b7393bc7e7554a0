# SPDX-License-Identifier: Apache-2.0
"""Opens a file with another user's rights: a child process becomes him, opens it, and hands the descriptor back. For root.

What a stranger has named is opened by him, so that he gets to see nothing that he could not read himself. A process of its own, since a
user is a property of whole processes: the other threads of this one go on as they are. Knows no images.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass

from fvd.device.node import typed_error
from fvd.errors import DeviceError, PermissionDenied, Timeout, Unsupported

NOBODY = 65534  # a user without rights, and his group
_ANSWER_BYTES = 32
_FD = struct.Struct("=i")
_RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
# Everything is imported before the user changes: nothing of this interpreter's need be readable for him. What is neither file nor device
# is not opened: that does things to a pipe or a tape.
_CHILD = """
import os, socket, stat, sys
parent = socket.socket(fileno=int(sys.argv[1]))
step = b"become"
try:
    os.setgroups([int(group) for group in sys.argv[4].split(",") if group])
    os.setresgid(*[int(sys.argv[3])] * 3)
    os.setresuid(*[int(sys.argv[2])] * 3)
    step = b"open"
    kind = os.stat(sys.argv[5]).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        step = b"kind"
        raise OSError(22, "kind")
    descriptor = os.open(sys.argv[5], os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    socket.send_fds(parent, [b"opened 0"], [descriptor])
except OSError as error:
    parent.send(step + b" %d" % (error.errno or 0))
"""


@dataclass(frozen=True)
class User:
    """A user as a process can be one."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def __str__(self) -> str:
        with contextlib.suppress(KeyError):
            return f"{pwd.getpwuid(self.uid).pw_name} ({self.uid})"
        return str(self.uid)


def user_of(uid: int) -> User:
    """The user with his groups, as the host's database has them. One that it does not know is in no group that has any rights: whoever
    made a file of his chose its group, which proves nothing."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return User(uid, NOBODY)
    return User(uid, entry.pw_gid, tuple(sorted(os.getgrouplist(entry.pw_name, entry.pw_gid))))


def open_as(path: str, user: User, timeout_seconds: float) -> int:
    """A descriptor of a file or block device, open for reading, which the user opened. The caller closes it.

    Raises NotFound, PermissionDenied (he may not), Unsupported (neither file nor device), Timeout, DeviceError.
    """
    ours, childs = socket.socketpair()
    with ours, childs:
        words = [str(childs.fileno()), str(user.uid), str(user.gid), ",".join(map(str, user.groups)), path]
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD, *words],
                pass_fds=[childs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,  # Ctrl-C is for us alone
            )
        except (OSError, ValueError) as error:
            raise DeviceError(f"{path}: no process can be started to open it as user {user}") from error
        childs.close()
        received: list[int] = []
        try:
            ours.settimeout(timeout_seconds)
            # Not recv_fds, which forgets its flags.
            answer, rights, _, _ = ours.recvmsg(_ANSWER_BYTES, socket.CMSG_LEN(_FD.size), socket.MSG_CMSG_CLOEXEC)
            received = [fd for level, kind, data in rights if (level, kind) == _RIGHTS for (fd,) in _FD.iter_unpack(data)]
        except TimeoutError as error:
            raise Timeout(
                f"{path}: opening it as user {user} has not ended within {timeout_seconds:g} s; is its file system there?"
            ) from error
        finally:
            # It may hang in a file system of that user's own; then it ends when that lets it.
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
    if len(received) == 1:
        return received[0]
    raise _failure(path, user, answer)


def _failure(path: str, user: User, answer: bytes) -> Exception:
    step, _, number = answer.decode(errors="replace").partition(" ")
    if step == "kind":
        return Unsupported(f"{path} is neither a regular file nor a block device; name a file or a block device")
    if not number.isdigit():
        return DeviceError(f"{path}: the process that was to open it as user {user} has ended without an answer")
    error = OSError(int(number), os.strerror(int(number)))
    if step == "become":
        return PermissionDenied(
            f"{path}: user {user} has named it, and this process may not become that user ({error.strerror}); "
            "give it the capabilities CAP_SETUID and CAP_SETGID"
        )
    return typed_error(error, "opening", path)
