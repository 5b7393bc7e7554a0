# SPDX-License-Identifier: Apache-2.0
"""The layers of docs/internals/architecture.md, held: who imports whom, and who may touch clocks, rng, sockets, processes and files.

The table is parsed out of that document, so the two cannot drift apart.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "internals" / "architecture.md"


def read_sources(folder: str) -> list[Path]:
    return sorted(path for pattern in ("*.py", "*.pyi", "*.pyx", "*.pxd", "*.pxi") for path in (ROOT / folder).rglob(pattern))


SOURCES = read_sources("fvd")
DEVTOOLS = read_sources("devtools")
PACKAGES = sorted({path.parent for path in SOURCES})
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))

pytestmark = pytest.mark.release_only

# --- The outside world: what counts as touching it, and the modules made for that --------------------------------------------


def words(text: str) -> set[str]:
    return set(text.split())


OUTSIDE_MODULES = {
    "clock": {"time", "sched"},
    "rng": {"random", "secrets", "uuid"},
    "socket": {"socket", "socketserver", "selectors", "select", "asyncio", "http", "urllib", "nbd"},
    "process": {"subprocess", "multiprocessing", "signal", "pty"},
    "file": {"fcntl", "mmap", "tempfile", "shutil", "pyudev", "glob", "fileinput", "ctypes"},
}
OUTSIDE_HEADERS = {
    "clock": {"time.h", "sys/time.h"},
    "rng": {"sys/random.h"},
    "socket": {"libnbd.h", "sys/socket.h", "netinet/in.h", "netinet/tcp.h", "sys/un.h"},
    "file": {
        "poll.h",
        "sys/epoll.h",
        "sys/eventfd.h",
        "liburing.h",
        "unistd.h",
        "fcntl.h",
        "sys/uio.h",
        "sys/ioctl.h",
        "sys/stat.h",
        "stdio.h",
        "linux/fs.h",
        "linux/falloc.h",
    },
    "process": {"pthread.h", "signal.h", "sys/wait.h"},
}
OUTSIDE_CIMPORTS = {
    "clock": {"posix.time", "libc.time", "fvd.device.clock"},
    "file": {"posix.unistd", "posix.fcntl", "posix.stat", "posix.ioctl", "posix.uio", "libc.stdio"},
    "process": {"posix.wait", "posix.signal", "libc.signal"},
}
OS_CALLS = {
    "clock": {"times"},
    "rng": {"urandom", "getrandom"},
    "process": {"system", "popen", "fork", "kill", "waitpid", "posix_spawn", "execv", "execve", "execvp"},
    "file": words(
        "open fdopen read write pread pwrite preadv pwritev readv writev fsync fdatasync sync lseek stat lstat fstat statvfs fstatvfs "
        "listdir scandir walk unlink remove rename replace mkdir makedirs rmdir truncate ftruncate link symlink readlink chmod fchmod "
        "chown fchown posix_fallocate posix_fadvise copy_file_range sendfile mknod mkfifo access utime pipe eventfd"
    ),
}
PATH_METHODS = words(
    "read_text read_bytes write_text write_bytes iterdir rglob unlink mkdir touch rmdir resolve exists is_file is_dir is_block_device "
    "is_socket lstat samefile symlink_to hardlink_to readlink"
)

# module -> (what it may touch, why it is the place for that)
ALLOWED: dict[str, tuple[set[str], str]] = {
    "fvd._lifetime": ({"process", "file", "clock"}, "threads that signals spare, and how long they are waited for; /dev/null after a fork"),
    "fvd.counted": ({"clock"}, "how many messages of a kind there were in a minute; injected in tests"),
    "fvd.device.clock": ({"clock"}, "the one clock of the compiled loops"),
    "fvd.device._queue": ({"file", "clock"}, "device operations: io_uring and the blocking queue; waits with a time limit"),
    "fvd.device._remote": (
        {"clock", "rng", "file", "process"},
        "a base over libnbd: connections, their time limits, back-off; the helper's lock and wake-ups; where a server's program is",
    ),
    "fvd.device.libnbd": ({"socket"}, "declarations of libnbd, which opens the sockets of bases"),
    "fvd.device.node": ({"file"}, "opens, reads and writes files and devices"),
    "fvd.device.claim": ({"file", "clock"}, "ownership: locks, O_EXCL, what holds a device; waits for what dead owners left under way"),
    "fvd.device.holders": ({"file"}, "reads /proc and /sys: who has a file open, and what is under way on a device"),
    "fvd.device.nbd_netlink": ({"socket"}, "generic netlink"),
    "fvd.device.nbd_devices": ({"file", "process"}, "nbd devices in /sys and their links; loads the driver; prctl, by ctypes"),
    "fvd.device.holes": ({"file"}, "where the holes of a file are"),
    "fvd.device.as_user": ({"process", "socket"}, "a child that becomes another user opens a file, and sends the descriptor"),
    "fvd.device.qemu_locks": ({"file"}, "locks on bytes of a file"),
    "fvd.device.lengthen": ({"file"}, "makes a file longer"),
    "fvd.device.names": ({"file"}, "what names lead to"),
    "fvd.device.folders": ({"file"}, "names of files: made, linked, renamed, removed in a folder that is open"),
    "fvd.device.failures": ({"clock"}, "when a flush failed; injected in tests"),
    "fvd.device.stack": ({"file"}, "reads /sys"),
    "fvd.device.signature": ({"file", "process"}, "asks wipefs what else lives on a device; where that program is"),
    "fvd.device.surviving": ({"file"}, "memory that outlives the process: files in a tmpfs; what this boot and host are"),
    "fvd.device.udev": ({"file", "clock", "socket"}, "waits for nodes with a time limit; listens to udev through libudev"),
    "fvd.lvm.runner": ({"process", "clock", "file"}, "runs lvm2's commands with a time limit; where those programs are"),
    "fvd.lvm.commands": ({"clock"}, "rests a moment before a command is tried again"),
    "fvd.lvm.dm": ({"file", "clock"}, "reads /sys; samples for how long a device is suspended"),
    "fvd.lvm.members": ({"file"}, "reads /sys and udev's database: which devices hold physical volumes"),
    "fvd.lvm.sharing": ({"file"}, "lock files"),
    "fvd.disk._disk_thread": (
        {"clock", "file", "process"},
        "a disk's loop in this process: a thread, its wake-up, the engine's ticks",
    ),
    "fvd.storage.allocator": ({"clock"}, "when a growth step began; injected in tests"),
    "fvd.disk.failing": ({"clock"}, "when a map could not be written; injected in tests"),
    "fvd.base.base": ({"file"}, "a descriptor for the program that reads an image, and whether its file is as it was"),
    "fvd.base.rights": ({"file"}, "whose files and folders are; the administrator's list"),
    "fvd.base.images": ({"file", "process"}, "runs qemu-img with a time limit; where QEMU's programs are"),
    "fvd.disk.opening": ({"clock", "rng"}, "gives copying its clock and its rng"),
    "fvd.disk.provision": ({"clock", "rng"}, "the UUID and the date of a new disk; injected in tests"),
    "fvd.disk.recovery": ({"clock", "file"}, "when a flush failed; the engine's buffers, by ctypes"),
    "fvd.export.server": ({"socket", "clock", "file"}, "the listening socket, handshakes with a time limit, the wake-up of the loop"),
    "fvd.export.listening": (
        {"socket", "rng", "file", "clock"},
        "sockets that listen, their names, owners and modes; names of temporary folders; how long another server that begins is waited for",
    ),
    "fvd.export.peers": ({"socket"}, "who is at the other end of a socket, and its options"),
    "fvd.export._server": ({"socket", "clock", "file"}, "the serving loop: the clients' sockets, the engine's ticks"),
    "fvd.export.front_end": ({"socket", "file"}, "a virtual machine's socket, and the descriptors that it hands over"),
    "fvd.export.guests": ({"socket"}, "the sockets at which virtual machines arrive"),
    "fvd.virtio._guest_memory": ({"file", "process"}, "maps a guest's memory, and handles the signal of memory that is taken away"),
    "fvd.control.paths": ({"file"}, "finds and makes the folder of the control sockets, and the identity of a volume's file"),
    "fvd.control.client": ({"socket", "clock"}, "asks a served disk, and waits so long for the whole answer"),
    "fvd.control.trust": ({"socket", "file"}, "whose process listens at a control socket, and whose a volume is"),
    "fvd.control.server": ({"socket", "file", "clock"}, "the control socket of a served disk, its lock and its mode; ends in time"),
    "fvd.control.streaming": ({"socket", "clock"}, "sends events to one subscriber, and a sign of life when there are none"),
    "fvd.control.following": ({"socket", "clock"}, "listens to many served disks at once; whose silence means what"),
    "fvd.control.inotify": ({"file"}, "the kernel's inotify"),
    "fvd.control.watching": ({"file"}, "inotify on the folders of the control sockets"),
    "fvd.control.wakeup": ({"file"}, "an eventfd"),
    "fvd.api.events": ({"clock"}, "when something happened; injected in tests"),
    "fvd.aio": ({"socket"}, "asyncio"),
    "fvd.api.attach": ({"socket"}, "takes NBD URIs apart: urllib.parse, which opens no socket"),
    "fvd.api.attaching": ({"file", "clock"}, "a device's last flush; how long those who look at it are waited for"),
    "fvd.api.host_device": ({"socket", "clock"}, "a pair of sockets, one for the kernel, which may take its time"),
    "fvd.api.listing": ({"file", "clock"}, "looks through the folders that one names; how long servers are asked"),
    "fvd.cli.__main__": ({"process"}, "Ctrl-C ends it while the rest is imported"),
    "fvd.cli.activation": ({"socket"}, "takes the sockets that a service manager hands over"),
    "fvd.cli.events": ({"process", "socket"}, "SIGTERM and SIGINT end it, and so does a reader that has gone"),
    "fvd.cli.notify": ({"socket"}, "tells systemd that a disk is ready"),
    "fvd.cli.output": ({"file"}, "the terminal's width; a reader that has gone"),
    "fvd.cli.process": ({"process", "file"}, "the standard streams, closed or full; Ctrl-C"),
    "fvd.cli.progress": ({"clock"}, "draws a progress bar, a few times a second"),
    "fvd.cli.prefetch": ({"clock"}, "sleeps between two looks at how far it is"),
    "fvd.cli.profile": ({"clock"}, "waits before it records"),
    "fvd.cli.serve": ({"process", "file"}, "SIGTERM and SIGINT end it, through a pipe"),
    "fvd.cli.suggest": ({"file"}, "the names in a folder, of which one may have been meant"),
    "fvd.cli.torture": ({"clock", "rng", "process", "file"}, "fresh seeds; how long it has run; SIGTERM ends it; a folder for an image"),
    "fvd.sim.foreign": ({"clock", "socket"}, "waits for an NBD server's answers"),
    "fvd.sim.qemu_nbd": ({"clock", "file", "process"}, "starts and kills qemu-nbd; its image"),
    "fvd.sim.torture": ({"process", "clock", "file"}, "worlds on all processors, for so many seconds; malloc_trim, by ctypes"),
}


# Buffers with an address; a console's history.
SIMULATOR_ALLOWED = {"file"}


class Import(NamedTuple):
    line: int
    module: str


# --- Reading the sources -----------------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path) for path in SOURCES}


def strip_cython(text: str) -> str:
    """Without comments and strings of several lines, which may talk about imports."""
    text = re.sub(r'"""(?:.|\n)*?"""', lambda match: "\n" * match.group().count("\n"), text)
    return re.sub(r"#.*", "", text)


def python_imports(path: Path) -> Iterator[Import]:
    package = module_name(path) if path.stem == "__init__" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0]
                base = f"{parent}.{base}" if base else parent
            yield from (Import(node.lineno, from_name(base, alias.name)) for alias in node.names)


def cython_imports(path: Path) -> Iterator[Import]:
    lines = re.sub(r"\([^()]*\)", lambda match: match.group().replace("\n", " "), strip_cython(path.read_text())).splitlines()
    for number, line in enumerate(lines, 1):
        if match := re.match(r"\s*from\s+([\w.]+)\s+c?import\s+(.*)", line):
            for name in re.findall(r"[\w*]+", re.sub(r"\bas\s+\w+", "", match[2])):
                yield Import(number, from_name(match[1], name))
        elif match := re.match(r"\s*c?import\s+(.*)", line):
            yield from (Import(number, part.split()[0]) for part in match[1].split(",") if part.split())


def from_name(base: str, name: str) -> str:
    """``from fvd import errors`` means fvd.errors; ``from fvd.errors import X`` means fvd.errors."""
    return f"{base}.{name}" if name == "*" or f"{base}.{name}" in MODULES else base


@cache
def imports(path: Path) -> list[Import]:
    return list(python_imports(path) if path.suffix in (".py", ".pyi") else cython_imports(path))


# --- Layers ------------------------------------------------------------------------------------------------------------------


class Package(NamedTuple):
    layer: int
    row: int  # modules named in one row of the table are one package


def read_packages() -> dict[str, Package]:
    packages = {}
    for row, line in enumerate(DOCUMENT.read_text().splitlines()):
        if match := re.match(r"\|\s*(\d+)\s*\|([^|]*)\|", line):
            for name in re.findall(r"`(fvd[\w.]*)`", match[2]):
                packages[name] = Package(int(match[1]), row)
    return packages


LAYERS = read_packages()


def package_of(module: str) -> tuple[str, Package] | None:
    if module in ("fvd", "fvd.*"):
        return "fvd.api", LAYERS["fvd.api"]
    for name, package in LAYERS.items():
        if module == name or module.startswith(f"{name}."):
            return name, package
    return None


def test_the_document_has_its_layers() -> None:
    assert {name: package.layer for name, package in LAYERS.items()} | {"fvd.errors": 0, "fvd._core": 1, "fvd.cli": 9} == {
        name: package.layer for name, package in LAYERS.items()
    }
    assert len({package.layer for package in LAYERS.values()}) == 10


def sources_of(package: Path) -> list[Path]:
    return [path for path in SOURCES if path.parent == package]


@each_package
def test_imports_go_down(package: Path) -> None:
    wrong = [text for path in sources_of(package) for text in wrong_imports(path)]
    assert not wrong, "\n".join(wrong)


def wrong_imports(path: Path) -> Iterator[str]:
    found = package_of(module_name(path))
    if found is None:
        yield f"{path} is in no package of docs/internals/architecture.md"
        return
    own_name, own = found
    for line, module in imports(path):
        if module.split(".")[0] != "fvd":
            continue
        target = package_of(module)
        if target is None:
            yield f"{path}:{line}: imports {module}, which is in no package of docs/internals/architecture.md"
            continue
        name, package = target
        if name == "fvd.sim" and own_name != "fvd.sim" and path.stem != "torture":
            yield f"{path}:{line}: only the tester's command imports fvd.sim"
        if package != own and package.layer >= own.layer:
            yield f"{path}:{line}: {own_name} (layer {own.layer}) may not import {module} (layer {package.layer})"


def test_no_modules_import_each_other() -> None:
    """Neither directly nor by way of others, wherever in a module it says so, and be it for types only."""
    imported: dict[str, set[str]] = {}
    for path in SOURCES:
        own = module_name(path)
        imported.setdefault(own, set()).update(module for _, module in imports(path) if module in MODULES and module != own)
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' is imported by '.join(error.args[1])}")


def test_fvd_does_without_devtools() -> None:
    """No package contains them."""
    assert DEVTOOLS and not [f"{path}:{line}" for path in SOURCES for line, module in imports(path) if module.split(".")[0] == "devtools"]


@pytest.mark.parametrize("path", DEVTOOLS, ids=lambda path: path.name)
def test_devtools_are_beside_the_layers(path: Path) -> None:
    """They may import any of them; all else that is asked of a source is asked of theirs."""
    assert not [module for _, module in imports(path) if module.endswith("*")]
    if path.suffix != ".pyi":
        says_what_it_is_for(path)


@each_package
def test_no_star_imports(package: Path) -> None:
    assert not [f"{path}:{line}" for path in sources_of(package) for line, module in imports(path) if module.endswith("*")]


@each_package
def test_first_paragraph(package: Path) -> None:
    """Each module begins by saying what it is for."""
    for path in sources_of(package):
        if path.suffix != ".pyi":
            says_what_it_is_for(path)


def says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(text))
    elif path.suffix == ".pxi":  # a part of a module: a docstring there would be a statement in the middle
        doc = "".join(re.findall(r"\A# SPDX.*\n((?:#.*\n)+)", text))
    else:
        doc = "".join(re.findall(r'\A\s*(?:#[^\n]*\n\s*)*"""((?:.|\n)*?)"""', text))
    assert doc, f"{path} does not say what it is for"
    first = doc.strip().split("\n\n")[0]
    assert len(first) >= 20, f"{path}: its docstring says too little: {first!r}"


# --- The outside world -------------------------------------------------------------------------------------------------------


def kinds_of(module: str, table: dict[str, set[str]]) -> Iterator[str]:
    for kind, names in table.items():
        if any(module == name or module.startswith(f"{name}.") for name in names):
            yield kind


@cache
def touches(path: Path) -> list[tuple[int, str, str]]:
    """(line, kind, what) of every use of the outside world in one source."""
    return list(find_touches(path))


def find_touches(path: Path) -> Iterator[tuple[int, str, str]]:
    for line, module in imports(path):
        for kind in (*kinds_of(module, OUTSIDE_MODULES), *kinds_of(module, OUTSIDE_CIMPORTS)):
            yield line, kind, module
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            yield from python_touches(node)
    elif path.suffix != ".pyi":
        text = path.read_text()
        for number, line_text in enumerate(strip_cython(text).splitlines(), 1):
            yield from cython_touches(number, line_text)
        for number, line_text in enumerate(text.splitlines(), 1):
            if match := re.match(r"\s*#\s*include\s*<([^>]+)>", line_text):  # in a verbatim block of C
                yield from ((number, kind, match[1]) for kind, names in OUTSIDE_HEADERS.items() if match[1] in names)


def python_touches(node: ast.AST) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "os":
            yield from ((node.lineno, kind, f"os.{node.attr}") for kind, names in OS_CALLS.items() if node.attr in names)
        elif node.attr in ("now", "utcnow", "today"):
            yield node.lineno, "clock", f".{node.attr}()"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
        yield node.lineno, "file", "open()"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATH_METHODS:
        if not (node.func.attr == "exists" and node.args):  # Path.exists() takes none; other things have an exists(name)
            yield node.lineno, "file", f".{node.func.attr}()"
    elif isinstance(node, ast.ImportFrom) and node.module == "os":
        for alias in node.names:
            yield from ((node.lineno, kind, f"os.{alias.name}") for kind, names in OS_CALLS.items() if alias.name in names)


def cython_touches(number: int, text: str) -> Iterator[tuple[int, str, str]]:
    if match := re.search(r"cdef\s+extern\s+from\s+[\"']<?([^\"'>]+)>?[\"']", text):
        yield from ((number, kind, match[1]) for kind, names in OUTSIDE_HEADERS.items() if match[1] in names)
    for name in re.findall(r"\bos\.(\w+)", text):
        yield from ((number, kind, f"os.{name}") for kind, names in OS_CALLS.items() if name in names)
    if re.search(r"(?<![\w.])open\(", text) and not re.search(r"\bc?p?def\b.*\bopen\(", text):
        yield number, "file", "open()"


@each_package
def test_outside_world_only_where_it_belongs(package: Path) -> None:
    wrong = []
    for path in sources_of(package):
        module = module_name(path)
        allowed = ALLOWED.get(module, (set(), ""))[0] | (SIMULATOR_ALLOWED if module.startswith("fvd.sim.") else set())
        wrong += [f"{path}:{line}: {what} ({kind})" for line, kind, what in touches(path) if kind not in allowed]
    assert not wrong, "\n".join([*wrong, "Move it to a module made for that, or add this module and the reason to ALLOWED."])


def test_the_allow_list_is_not_stale() -> None:
    for module, (kinds, reason) in ALLOWED.items():
        assert reason, module
        assert module in MODULES, f"{module} is gone: take it off the list"
        used = {kind for path in SOURCES if module_name(path) == module for _, kind, _ in touches(path)}
        assert kinds == used, f"{module} is allowed {sorted(kinds)} and uses {sorted(used)}"


# --- Importing does no work --------------------------------------------------------------------------------------------------

WATCHED_IMPORT = r"""
import sys, threading
seen = []
QUIET = ("import", "compile", "exec", "marshal.", "object.", "sys.", "code.", "os.listdir", "os.scandir", "cpython.", "ctypes.",
         "builtins.", "mmap.__new__", "function.__new__", "os.putenv", "os.unsetenv")
def hook(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int) or str(path).endswith((".py", ".pyc", ".so", ".pth", ".zip")) and (mode is None or "r" in mode):
            return
        seen.append((event, str(path), mode))
    elif not event.startswith(QUIET):
        seen.append((event, repr(args)[:200]))
{before}
sys.addaudithook(hook)
{imports}
assert threading.active_count() == 1, threading.enumerate()
assert not seen, seen
"""


def run_watched(import_lines: str, before: str = "") -> None:
    code = WATCHED_IMPORT.replace("{before}", before).replace("{imports}", import_lines)
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr


def test_import_fvd_does_no_work() -> None:
    run_watched("import fvd")


def test_import_fvd_is_light() -> None:
    """``fvd-lv --help`` need not wait for numpy: the heavy layers come with the first verb."""
    run_watched("import fvd\nassert 'numpy' not in sys.modules")


def test_importing_every_module_does_no_work() -> None:
    """Libraries (numpy, pyudev) come first: what they do at import is theirs."""
    names = sorted(name for name in MODULES if not name.endswith("__main__") and importable(name))
    run_watched("\n".join(f"import {name}" for name in names), before=libraries())


def importable(name: str) -> bool:
    """Has a .py or a .pyx: a lone .pxd is declarations only."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.with_suffix(".pyx").exists() or (path / "__init__.py").exists()


def libraries() -> str:
    outside = {module.split(".")[0] for path in SOURCES if path.suffix == ".py" for _, module in imports(path)} - {"fvd", "__future__"}
    return "\n".join(f"import {name}" for name in sorted(outside))
