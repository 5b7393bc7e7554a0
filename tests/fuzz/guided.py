# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of one target, by atheris (libFuzzer): `python tests/fuzz/guided.py TARGET [libFuzzer's options] [FOLDERS]`.

PYTHONPATH chooses the build. fvd's Python is instrumented in each; its compiled modules are in the fuzz build, where AddressSanitizer
watches them too. A finding ends the process with its input in the current folder, named crash-...; run it again by giving the file.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
TARGET_VARIABLE = "FVD_FUZZ_TARGET"


def is_sanitized(tree: Path) -> bool:
    """Whether its compiled modules need AddressSanitizer in the process."""
    return any(b"__asan_init" in path.read_bytes() for path in (tree / "fvd").glob("_core.*.so"))


def main() -> None:
    tree = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    runtime = str(Path(atheris.path()) / "asan_with_fuzzer.so")
    if is_sanitized(tree) and os.environ.get("LD_PRELOAD") != runtime:
        # AddressSanitizer must come first into a process. Python frees little at its end, which is no leak.
        os.environ |= {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=64"}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(include=["fvd"], enable_loader_override=False):
        from targets import TARGETS

        logging.getLogger("fvd").setLevel(logging.CRITICAL)  # the server says for each disk that blocking I/O was asked for
    # libFuzzer starts itself again, by a shell and with the options only, when it merges folders.
    name = os.environ.get(TARGET_VARIABLE) or sys.argv.pop(1)
    os.environ[TARGET_VARIABLE] = name
    arguments = [f"{sys.executable} {Path(__file__).resolve()}", *sys.argv[1:]]
    atheris.Setup(arguments, TARGETS[name], internal_libfuzzer="LD_PRELOAD" not in os.environ)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
