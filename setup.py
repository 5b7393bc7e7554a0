"""Build the compiled modules.

FVD_BUILD=release (default): -O3, no bounds checks.
FVD_BUILD=checked: bounds and initialisation checks, internal invariants asserted, and the seeded bugs that prove the tests
    (off until a test switches one on). A release contains none of them.
FVD_BUILD=coverage: checked, with line tracing.
FVD_BUILD=fuzz: checked, compiled by clang with AddressSanitizer and libFuzzer's counters (tests/fuzz); needs both in the process.
FVD_ONLY=a.b,c.d: build only these modules.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

BUILD = os.environ.get("FVD_BUILD", "release")
if BUILD not in ("release", "checked", "coverage", "fuzz"):
    raise SystemExit(f"FVD_BUILD={BUILD}: choose release, checked, coverage or fuzz")
CHECKED = BUILD != "release"

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

COMPILE = ["-O3", "-fno-strict-aliasing", "-Wall", "-Wno-unused-function", "-Wno-sign-compare"]
SANITIZE: list[str] = []
if BUILD == "fuzz":
    os.environ["CC"] = "clang"
    SANITIZE = ["-fsanitize=address,fuzzer-no-link"]
    COMPILE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-w", *SANITIZE]

# liburing is linked statically so that a wheel runs where only the kernel has io_uring.
LINK = {"fvd.device._queue": ["-l:liburing.a"], "fvd.device._remote": ["-lnbd"]}


def extensions() -> list[Extension]:
    wanted = {name for name in os.environ.get("FVD_ONLY", "").split(",") if name}
    found = []
    for path in sorted(Path("fvd").rglob("*.pyx")):
        name = ".".join(path.with_suffix("").parts)
        if wanted and name not in wanted:
            continue
        found.append(
            Extension(
                name,
                [str(path)],
                define_macros=MACROS,
                include_dirs=["fvd"],
                extra_compile_args=COMPILE,
                extra_link_args=[*LINK.get(name, []), *SANITIZE],
            )
        )
    return found


setup(
    ext_modules=cythonize(
        extensions(),
        compiler_directives=DIRECTIVES,
        build_dir=f"build/cython-{BUILD}",
        nthreads=int(os.environ.get("FVD_JOBS", "0")),
    ),
    # Objects of one build are never taken for another's.
    options={"build": {"build_base": f"build/objects-{BUILD}"}},
)
