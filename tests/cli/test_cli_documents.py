# SPDX-License-Identifier: Apache-2.0
"""What is written about the command line is what it does: manual page, completions, help, exit codes."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from fvd.cli.failure import exit_code_table
from fvd.cli.main import build_parser
from fvd.device import surviving
from fvd.errors import PermissionDenied
from fvd.modes import CACHE_HELP, CACHE_MODES

ROOT = Path(__file__).resolve().parent.parent.parent
BASH_COMPLETION = ROOT / "completions" / "fvd-lv.bash"
COMMANDS = (
    *("provision", "serve", "extend", "info", "attach-info", "attach", "detach", "events", "prefetch", "copy-on-read", "profile"),
    *("map", "check", "acknowledge", "dump", "list", "remove", "torture"),
)

pytestmark = pytest.mark.release_only


def parsers() -> dict[str, argparse.ArgumentParser]:
    [found] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


def man_page() -> str:
    return (ROOT / "docs" / "fvd-lv.1").read_text().replace("\\-", "-")


def test_every_command_is_there() -> None:
    assert tuple(parsers()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_manual_page_has_every_option(command: str) -> None:
    page = man_page()
    assert re.search(rf'^\.BI "{command} ', page, re.MULTILINE), f"{command} is not in docs/fvd-lv.1"
    for action in parsers()[command]._actions:
        for option in action.option_strings:
            assert option in page, f"{command} {option} is not in docs/fvd-lv.1"
        for choice in action.choices or ():
            assert str(choice) in page


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_each_cache_mode_says_what_it_promises(mode: str) -> None:
    text = (ROOT / "docs" / "internals" / "durability.md").read_text()
    assert re.search(rf"^\| `{mode}`[^|]*\|[^|]+\|[^|]+\|[^|]+\|$", text, re.MULTILINE), f"{mode} has no row in durability.md"
    assert f".B {mode}\n" in man_page(), f"{mode} is not described in docs/fvd-lv.1"
    assert re.search(rf"\b{mode}\b", CACHE_HELP), f"--help does not say what {mode} is"


def test_manual_page_has_every_exit_code() -> None:
    section = man_page().partition('.\\" exit codes: begin\n')[2].partition('.\\" exit codes: end')[0]
    told = re.findall(r"\.TP\n\.B (\d+)\n(.+)\n", section)
    known = [tuple(line.split(maxsplit=1)) for line in exit_code_table().splitlines()]
    assert [(code, text.lower().rstrip(".")) for code, text in told] == [(code, text.lower().rstrip(".")) for code, text in known]


def test_manual_page_is_well_formed() -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", str(ROOT / "docs" / "fvd-lv.1")], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    # A groff without all of its packages (Debian's groff-base) lacks things that no page is to blame for.
    assert not [line for line in done.stderr.splitlines() if "fvd-lv.1" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command: str) -> None:
    """An example in --help is a command that works, as far as its words go."""
    text = parsers()[command].format_help()
    examples = re.findall(r"^  fvd-lv (.*?)(?: {3,}.*| [|&>].*)?$", text.partition("examples:")[2], re.MULTILINE)
    assert examples
    for example in examples:
        build_parser().parse_args(example.split())


# --- Completions ---------------------------------------------------------------------------------------------------------------


def generator() -> ModuleType:
    path = str(ROOT / "scripts" / "make-completions")
    spec = importlib.util.spec_from_loader("make_completions", importlib.machinery.SourceFileLoader("make_completions", path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_completions_are_up_to_date() -> None:
    for name, write in generator().FILES.items():
        assert (ROOT / "completions" / name).read_text() == write(), "run scripts/make-completions"


def complete(*words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers for the last of the words."""
    code = (
        f'source "{BASH_COMPLETION}"; COMP_WORDS=("$@"); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _fvd_lv; '
        '((${#COMPREPLY[@]})) && printf "%s\\n" "${COMPREPLY[@]}"; true'
    )
    done = subprocess.run(["bash", "-c", code, "bash", "fvd-lv", *words], capture_output=True, text=True, check=True, cwd=cwd)
    return done.stdout.split()


def test_bash_completion_is_registered() -> None:
    code = f'source "{BASH_COMPLETION}"; complete -p fvd-lv'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["complete", "-F", "_fvd_lv", "fvd-lv"]


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "vm1.img").touch()
    (tmp_path / "disks").mkdir()
    assert set(complete("")) >= set(COMMANDS)
    assert complete("pro") == ["provision", "profile"]
    assert complete("prov") == ["provision"]
    assert complete("serve", "--ca") == ["--cache"]
    assert complete("serve", "file:x", "--cache", "w") == ["writeback", "writethrough"]
    assert complete("--output", "json", "info", "--verb") == ["--verbose"]
    assert complete("info", "fi") == ["file:"]
    assert sorted(complete("info", "file", ":", cwd=tmp_path)) == ["disks", "vm1.img"]
    assert complete("info", "file", ":", "vm", cwd=tmp_path) == ["vm1.img"]
    assert complete("list", "d", cwd=tmp_path) == ["disks"]
    assert complete("extend", "file:x", "--by", "") == []
    assert complete("prefetch", "sta") == ["start", "status"]
    assert complete("prefetch", "start", "fi") == ["file:"]
    assert complete("prefetch", "status", "--fo") == ["--follow"]
    assert complete("copy-on-read", "") == ["on", "off"]
    assert complete("serve", "file:x", "--prefetch", "") == ["on", "off"]
    assert complete("provision", "file:x", "--base-format", "qc") == ["qcow2"]
    (tmp_path / "debian.fvd-profile").touch()
    assert complete("profile", "show", "deb", cwd=tmp_path) == ["debian.fvd-profile"]
    assert complete("profile", "record", "fi") == ["file:"]


def test_zsh_completion_parses() -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    subprocess.run(["zsh", "-n", str(ROOT / "completions" / "_fvd-lv")], check=True)


# --- systemd -------------------------------------------------------------------------------------------------------------------


def test_the_unit_runs_a_command_that_exists() -> None:
    text = (ROOT / "systemd" / "fvd@.service").read_text()
    [command] = re.findall(r"^ExecStart=/usr/bin/env fvd-lv (.*)$", text, re.MULTILINE)
    [example] = re.findall(r"^#\s+OPTIONS=(.*)$", text, re.MULTILINE)
    words = command.replace("${VOLUME}", "/dev/vg0/vm1").replace("$OPTIONS", example).replace("%i", "vm1").split()
    arguments = build_parser().parse_args(words)
    assert (arguments.volumes, arguments.socket, arguments.socket_mode) == (["/dev/vg0/vm1"], "/run/fvd/vm1.nbd", 0o660)


def test_the_unit_is_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "fvd@vm1.service"
    unit.write_text((ROOT / "systemd" / "fvd@.service").read_text())
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    wrong = [line for line in done.stderr.splitlines() if "fvd@" in line and "not found" not in line.lower()]
    assert wrong == []


def test_the_unit_is_confined() -> None:
    """By systemd's own measure, 0 to 10; what it says works in there is tests/lvm/real/test_unit.py."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    words = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=50", str(ROOT / "systemd" / "fvd@.service")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    [exposure] = re.findall(r"Overall exposure level for .*: ([0-9.]+) ", done.stdout)
    assert float(exposure) <= 5.0 and done.returncode == 0, done.stderr


def test_what_a_killed_server_had_acknowledged_outlives_the_unit(pending_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd makes the folder above the logs, with the mode that the unit says, and must not remove it between two starts."""
    text = (ROOT / "systemd" / "fvd@.service").read_text()
    settings = dict(re.findall(r"^(RuntimeDirectory\w*)=(.*)$", text, re.MULTILINE))
    assert settings["RuntimeDirectoryPreserve"] == "yes"
    assert surviving._candidates(0)[0] == Path("/run") / settings["RuntimeDirectory"] / "pending"
    assert not re.search(r"^(PrivateTmp|TemporaryFileSystem|InaccessiblePaths|DynamicUser|User)=", text, re.MULTILINE), "other folders then"
    memory = surviving.make("a.1", 4096)
    memory.close()
    pending_dir.parent.chmod(int(settings["RuntimeDirectoryMode"], 8))
    again = surviving.find(memory.path)
    again.remove()
    again.close()
    surviving.make("a.2", 4096).close()
    assert [path.name for path in pending_dir.iterdir()] == ["a.2"]
    assert settings["RuntimeDirectoryMode"] == "0711", "others pass through to the sockets of their disks"
    for mode in (0o733, 0o731, 0o713):  # whoever may write there could put a log in place of ours
        pending_dir.parent.chmod(mode)
        with pytest.raises(PermissionDenied):
            surviving.find(pending_dir / "a.2")
