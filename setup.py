# SPDX-License-Identifier: Apache-2.0
"""Build the compiled modules.

FVD_BUILD=release (default): -O3, no bounds checks.
FVD_BUILD=checked: bounds and initialisation checks, internal invariants asserted, and the seeded bugs that prove the tests
    (off until a test switches one on). A release contains none of them.
FVD_BUILD=coverage: checked, with line tracing.
FVD_BUILD=fuzz: checked, compiled by clang with AddressSanitizer and libFuzzer's counters (tests/fuzz); needs both in the process.
FVD_ONLY=a.b,c.d: build only these modules.
FVD_DEVTOOLS=1: build devtools too, which tests and benchmarks need. The Makefile sets it; what builds a package does not.
FVD_OPTIMIZE=0: the compiler's level; if not set 3, or 1 for the checked build. A build that is only to work once is worth no more.
FVD_COMPILED=folder: nothing is compiled, the modules are taken from a tree where `make build` has compiled them. For tests of packages.

In the source package of scripts/make-deb the folder `generated` has what Cython makes of the sources, and Cython is not needed.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("FVD_BUILD", "release")
if BUILD not in ("release", "checked", "coverage", "fuzz"):
    raise SystemExit(f"FVD_BUILD={BUILD}: choose release, checked, coverage or fuzz")
CHECKED = BUILD != "release"
COMPILED = os.environ.get("FVD_COMPILED")
FOLDERS = ["fvd", "devtools"] if os.environ.get("FVD_DEVTOOLS") == "1" else ["fvd"]
GENERATED = Path("generated")

MACROS = [("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]
if CHECKED:
    MACROS += [("FVD_CHECKED", "1"), ("FVD_SEEDED_BUGS", "1")]
if BUILD == "coverage":
    MACROS += [("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": CHECKED,
    "initializedcheck": CHECKED,
    "wraparound": False,
    "cdivision": True,
    "embedsignature": True,
    "linetrace": BUILD == "coverage",
}

# The checked build is compiled in half the time by -O1, and most of what it runs is Python.
OPTIMIZE = os.environ.get("FVD_OPTIMIZE", "1" if BUILD == "checked" else "3")
COMPILE = [f"-O{OPTIMIZE}", "-fno-strict-aliasing", "-Wall", "-Wno-unused-function", "-Wno-sign-compare"]
SANITIZE: list[str] = []
if BUILD == "fuzz":
    os.environ["CC"] = "clang"
    SANITIZE = ["-fsanitize=address,fuzzer-no-link"]
    COMPILE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-w", *SANITIZE]

# liburing is linked statically so that a wheel runs where only the kernel has io_uring.
LINK = {"fvd.device._queue": ["-l:liburing.a"], "fvd.device._remote": ["-lnbd"]}

# What is compiled against, and Debian's package for it.
NEEDED = {"stdio.h": "libc6-dev", "Python.h": "python3-dev", "liburing.h": "liburing-dev", "libnbd.h": "libnbd-dev"}


class BuildExtensions(build_ext):
    """Says which packages are missing before a compiler stumbles over it, in words that pip shows."""

    def run(self) -> None:
        missing = self.missing_packages() if COMPILED is None else []
        if missing:
            raise SystemExit(
                f"fvd cannot be compiled here: {', '.join(missing)} missing (Debian's names). Run: apt-get install {' '.join(missing)}"
            )
        super().run()

    def build_extension(self, extension: Extension) -> None:
        if COMPILED is None:
            super().build_extension(extension)
            return
        name = self.get_ext_filename(extension.name)
        self.copy_file(str(Path(COMPILED, name)), str(Path(self.build_lib, name)))

    def missing_packages(self) -> list[str]:
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        if shutil.which(compiler[0]) is None:
            return ["gcc", *NEEDED.values()]  # nobody to ask for the headers
        flags = [*shlex.split(os.environ.get("CPPFLAGS", "")), *shlex.split(os.environ.get("CFLAGS", ""))]
        command = [*compiler, "-E", *flags, *(f"-I{folder}" for folder in self.include_dirs or []), "-x", "c", "-"]
        return [
            package
            for header, package in NEEDED.items()
            if subprocess.run(command, input=f"#include <{header}>\n", capture_output=True, text=True, check=False).returncode
        ]


def extensions() -> list[Extension]:
    wanted = {name for name in os.environ.get("FVD_ONLY", "").split(",") if name}
    found = []
    for path in sorted(path for folder in FOLDERS for path in Path(folder).rglob("*.pyx")):
        name = ".".join(path.with_suffix("").parts)
        if wanted and name not in wanted:
            continue
        found.append(
            Extension(
                name,
                [str(GENERATED / path.with_suffix(".c") if GENERATED.is_dir() else path)],
                define_macros=MACROS,
                include_dirs=["fvd"],
                extra_compile_args=COMPILE,
                extra_link_args=[*LINK.get(name, []), *SANITIZE],
            )
        )
    return found


def modules() -> list[Extension]:
    """Of C, ready to be compiled."""
    if GENERATED.is_dir():
        return extensions()
    from Cython.Build import cythonize

    return cythonize(
        extensions(),
        compiler_directives=DIRECTIVES,
        build_dir=f"build/cython-{BUILD}",
        nthreads=int(os.environ.get("FVD_JOBS", "0")),
    )


setup(
    ext_modules=modules(),
    cmdclass={"build_ext": BuildExtensions},
    # Objects of one build are never taken for another's. A package takes all modules that are there, so it has a folder of its own.
    options={
        "build": {"build_base": f"build/{'objects' if len(FOLDERS) > 1 else 'package-objects'}-{BUILD}"},
        "build_ext": {"parallel": int(os.environ.get("FVD_JOBS", "0")) or None},
    },
)
