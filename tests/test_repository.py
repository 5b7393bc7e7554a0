# SPDX-License-Identifier: Apache-2.0
"""What a stranger finds beside the code: a licence, one version everywhere, tools that are set up as `make lint` uses them."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import fvd

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

pytestmark = [pytest.mark.release_only, pytest.mark.pure]


def test_the_licence_is_named_alike_everywhere() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"] and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == {"text": "Apache-2.0"}
    assert "License :: OSI Approved :: Apache Software License" in PROJECT["project"]["classifiers"]


def test_the_changes_end_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0].rstrip(",") == fvd.__version__


def test_the_debian_package_has_this_version_and_needs_what_pip_would_bring() -> None:
    first = (ROOT / "debian" / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"fvd ({fvd.__version__}) ")
    control = (ROOT / "debian" / "control").read_text()
    for name, version in (re.fullmatch(r"(\w+)>=([\d.]+)", needed).groups() for needed in PROJECT["project"]["dependencies"]):  # type: ignore[union-attr]
        assert re.search(rf"python3-{name} \(>= (1:)?{re.escape(version)}\)", control)


def test_setup_installs_what_the_package_is_built_with() -> None:
    control, packages = (ROOT / "debian" / "control").read_text(), (ROOT / "scripts" / "debian-packages.txt").read_text()
    [needed] = re.findall(r"^Build-Depends: (.*?)^\S", control, re.MULTILINE | re.DOTALL)
    names = {name.split()[0].replace("debhelper-compat", "debhelper") for name in needed.split(",")}
    assert names <= set(re.findall(r"^(?:need|test) (\S+)", packages, re.MULTILINE))


def test_pythons_that_are_promised_are_allowed() -> None:
    versions = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert versions[0] == PROJECT["project"]["requires-python"].removeprefix(">=") == PROJECT["tool"]["mypy"]["python_version"]


def test_editors_and_linters_agree_on_the_line() -> None:
    lengths = {int(number) for number in re.findall(r"^max_line_length = (\d+)", (ROOT / ".editorconfig").read_text(), re.MULTILINE)}
    assert lengths == {PROJECT["tool"]["ruff"]["line-length"], PROJECT["tool"]["cython-lint"]["max-line-length"]}


def test_a_commit_is_checked_by_the_tools_of_make_lint() -> None:
    entries = re.findall(r"entry: .*?\.venv/bin/([\w-]+)\b(?!:)", (ROOT / ".pre-commit-config.yaml").read_text())
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None and set(entries) >= {"ruff", "mypy", "cython-lint"}
    assert all(re.search(rf"\b{tool}\b", lint[1]) for tool in ("ruff", "scripts/typecheck", "cython-lint"))
    assert "mypy" in (ROOT / "scripts" / "typecheck").read_text()


def test_each_source_names_its_licence() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("git tells what is a source, and this is no checkout")
    done = subprocess.run([ROOT / "scripts" / "spdx", "--missing"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), f"run scripts/spdx:\n{done.stdout}{done.stderr}"


def test_a_compiled_interface_is_documented_once() -> None:
    """In the stub: what stood in both places drifted apart."""
    twice = []
    for stub in (ROOT / "fvd").rglob("*.pyi"):
        source = stub.with_suffix(".pyx")
        if not source.exists():
            continue
        documented = {
            node.name for node in ast.walk(ast.parse(stub.read_text())) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
        }
        defined = re.findall(r'^ *(?:def|cpdef [^\n(]*?) ?(\w+)\((?:[^()]|\([^()]*\))*\)[^\n]*:\n +"""', source.read_text(), re.MULTILINE)
        twice += [f"{source.relative_to(ROOT)}: {name}" for name in defined if name in documented]
    assert twice == []
