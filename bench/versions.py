# SPDX-License-Identifier: Apache-2.0
"""The versions of everything that takes part in a measurement. Knows no suite."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

PROGRAMS = {
    "fio": ("fio", "--version"),
    "qemu-nbd": ("qemu-nbd", "--version"),
    "nbdkit": ("nbdkit", "--version"),
    "linux.uml": ("linux.uml", "--version"),
    "mke2fs": ("mke2fs", "-V"),
    "mkfs.xfs": ("mkfs.xfs", "-V"),
}
PACKAGES = {"postmark": ("postmark",), "liburing": ("liburing2", "liburing-dev"), "libnbd": ("libnbd0", "libnbd-dev")}
ABSENT = "not there"


def first_line(*command: str) -> str:
    """Of what it prints; "" if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ((done.stdout.strip() or done.stderr.strip()).splitlines() or [""])[0].strip()


def of_package(*names: str) -> str:
    """What tells no version itself is asked of the package manager."""
    found = (first_line("dpkg-query", "--show", "--showformat=${Version}", name) for name in names if shutil.which("dpkg-query"))
    return next((version for version in found if version), "")


def versions() -> dict[str, str]:
    import fvd

    found = {"fvd": fvd.__version__, "python": f"{platform.python_implementation()} {platform.python_version()}"}
    found |= {name: first_line(*command) or ABSENT for name, command in PROGRAMS.items()}
    found |= {name: of_package(*packages) or ABSENT for name, packages in PACKAGES.items()}
    return {name: re.sub(rf"^(?:{re.escape(name)})?[- ]*(?:version )?", "", version) for name, version in found.items()}
