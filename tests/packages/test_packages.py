# SPDX-License-Identifier: Apache-2.0
"""The Debian package and the wheel: built from this tree, used on a bare Debian of each supported release that systemd has booted.

What is built for this machine's Debian contains the modules that `make build` has compiled; compiling them once more takes minutes. For
Debian 13 they are compiled, in a root of that release, from the source package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fvd

ROOT = Path(__file__).resolve().parents[2]
UML = ROOT / "scripts" / "uml"
STORY = Path(__file__).with_name("package_story.py")
# Not in a folder that systemd empties as it boots: the guest takes the packages from there.
PLACE = ROOT / "build" / "packages"
OLDER = "0.1.0"
SETUP_SECONDS = 1500
GUEST_SECONDS = 1200

pytestmark = [pytest.mark.release_only, pytest.mark.slow]


def release() -> str:
    """Of Debian, that this machine runs."""
    lines = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return lines.get("VERSION_ID", "").strip('"') if lines.get("ID") == "debian" else ""


def run(*words: str | Path, seconds: float, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=seconds,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{' '.join(map(str, words))} ended with {done.returncode}; what it said is below"
    return done.stdout


@pytest.fixture
def place() -> Path:
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    return PLACE


def bare_root(*words: str | Path, **environment: str) -> Path:
    """Skips, with the reason, where it cannot be made; in CI that is a failure."""
    if shutil.which("linux.uml") is None:
        pytest.skip("no machine to boot: apt-get install user-mode-linux")
    if ROOT.is_relative_to("/tmp") or ROOT.is_relative_to("/var/tmp"):
        pytest.skip(f"a guest's systemd empties /tmp and /var/tmp as it boots, and {ROOT} would be shared with it: clone it elsewhere")
    command = [str(ROOT / "scripts" / "package-root"), *map(str, words)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SETUP_SECONDS,
    )
    if done.returncode != 0:
        why = f"no bare Debian to test on: {done.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    return Path(done.stdout.splitlines()[-1])


def older(package: Path, place: Path) -> Path:
    """The package that is upgraded from: FVD_PACKAGE_BEFORE, built from an older commit, or the new one under an older version's name."""
    if given := os.environ.get("FVD_PACKAGE_BEFORE"):
        return Path(shutil.copy(given, place))
    folder, version = place / "older", package.name.split("_")[1]
    run("dpkg-deb", "--raw-extract", package, folder, seconds=60)
    control, init = folder / "DEBIAN" / "control", folder / "usr" / "lib" / "python3" / "dist-packages" / "fvd" / "__init__.py"
    assert f"Version: {version}\n" in control.read_text() and version.startswith(fvd.__version__)
    control.write_text(control.read_text().replace(f"Version: {version}", f"Version: {OLDER}{version.removeprefix(fvd.__version__)}"))
    init.write_text(init.read_text().replace(fvd.__version__, OLDER))
    [information] = init.parent.parent.glob("fvd-*.dist-info")
    metadata = information / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {fvd.__version__}\n", f"\nVersion: {OLDER}\n"))
    information.rename(information.with_name(f"fvd-{OLDER}.dist-info"))
    run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", folder, place, seconds=60)
    shutil.rmtree(folder)
    [made] = place.glob(f"fvd_{OLDER}*.deb")
    return made


def play(root: Path, place: Path, tmp_path: Path, package: Path, *wheel: str | Path) -> None:
    disk = tmp_path / "disk.img"
    guest: list[str | Path] = [UML, "--root", root, "--systemd", "--timeout", str(GUEST_SECONDS), "--disk", f"{disk}:4G", "--"]
    try:
        said = run(
            sys.executable, *guest, "python3", STORY, older(package, place), package, "/dev/ubda", *wheel, seconds=GUEST_SECONDS + 30
        )
    finally:
        disk.unlink(missing_ok=True)
    assert said.endswith("All checks passed.\n")


def without_devtools(package: Path, wheel: Path) -> None:
    """What only tests and benchmarks use stays here."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = archive.namelist()
    in_package = run("dpkg-deb", "--contents", package, seconds=SETUP_SECONDS).splitlines()
    for names in (in_wheel, in_package):
        assert any("fvd/export/_server." in name for name in names)
        assert not [name for name in names if "devtools" in name or "_passthrough" in name]


def test_on_the_debian_of_this_machine(place: Path, tmp_path: Path) -> None:
    if release() not in ("12", "13"):
        pytest.skip("packages are built on Debian 12 and 13")
    if shutil.which("dh") is None:
        pytest.skip("the package is built with debhelper: apt-get install debhelper dh-python pybuild-plugin-pyproject")
    if Path(sys.base_prefix) != Path("/usr"):
        pytest.skip(f"the package is for Debian's Python, and the tests run with that of {sys.base_prefix}")
    root = bare_root(release())
    run(ROOT / "scripts" / "make-deb", seconds=SETUP_SECONDS, FVD_COMPILED=str(ROOT), FVD_DIST=str(place))
    said = run(sys.executable, ROOT / "scripts" / "make-wheel", place, seconds=SETUP_SECONDS, FVD_COMPILED=str(ROOT))
    # It names what it lacks.
    assert "apt install libnbd0" in said and "apt install lvm2" in said and "glibc 2." in said
    [package], [wheel] = place.glob("fvd_*.deb"), place.glob("*.whl")
    without_devtools(package, wheel)
    # pip of the virtual environment: the bare Debian has none.
    pip = next(Path(folder) for folder in sys.path if (Path(folder) / "pip").is_dir())
    play(root, place, tmp_path, package, wheel, pip)


# Compiling everything, and a root of 750 MB, take minutes; what is other there than on 12 changes with Debian, hardly with us.
@pytest.mark.long
def test_on_debian_13_compiled_from_the_source_package(place: Path, tmp_path: Path) -> None:
    root = bare_root("13")
    bare_root("13", "build", place, DEB_BUILD_OPTIONS="noopt")
    [package] = place.glob("fvd_*.deb")
    play(root, place, tmp_path, package)
