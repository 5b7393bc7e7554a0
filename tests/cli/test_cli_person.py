# SPDX-License-Identifier: Apache-2.0
"""What a person meets: guesses at what was meant, several volumes at once, sizes, advice that loses nothing, messages in plain words."""

from __future__ import annotations

import argparse
import ast
import errno
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fvd_commands import Done

import fvd
from fvd.api.attach import describe, reachable
from fvd.api.listing import Listing
from fvd.cli import list_volumes, torture
from fvd.cli.main import build_parser, main
from fvd.errors import FvdError, InvalidArgument, quoted
from fvd.modes import CACHE_MODES
from fvd.units import GIB, parse_size

pytestmark = pytest.mark.pure
ROOT = Path(__file__).resolve().parent.parent.parent
FvdLv = Callable[..., Done]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    try:
        code = main(words)
    except SystemExit as leaving:
        code = int(str(leaving.code))
    out, err = capsys.readouterr()
    return code, out, err


# --- What was meant ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["sereve", "file:a"], "there is no command 'sereve'; did you mean serve?"),
        (["xyzzy"], "there is no command 'xyzzy'; there are provision, serve, "),
        (["provision", "file:a", "--sise", "1G"], "there is no '--sise'; did you mean --size?"),
        (["serve", "file:a", "--sokcet=vm.sock"], "did you mean --socket?"),
        (["serve", "file:a", "--cache", "writebak"], f"'writebak' is none of {', '.join(CACHE_MODES)}; did"),
        (["info", "vm1.img"], "did you mean file:vm1.img?"),
        (["provision", "file:a", "--size", "10GB"], "write 10G or 10GiB"),
        (["provision", "vg0/a", "--size", "1G", "--max-overcommit", "much"], "'much' is not a number"),
        (["torture", "--worlds", "many"], "'many' is not a whole number"),
    ],
)
def test_did_you_mean(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, *words)
    assert code == 2 and meant in err and err.count("\n") == 1, err


def test_a_volume_that_was_meant(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "vm1.img").touch()
    for command in ("info", "check", "dump"):
        code, _, err = said(capsys, command, "file:vm11.img")
        assert code == 3 and "; did you mean file:vm1.img?" in err
    assert "did you mean" not in said(capsys, "info", "file:entirely-different")[2]


def test_sizes_that_could_be_two() -> None:
    with pytest.raises(InvalidArgument, match=r"'1\.5 tb' could be 1\.5 times 1000000000000 or times 1099511627776 bytes; write 1\.5T or"):
        parse_size("1.5 tb")
    assert parse_size("10GiB") == parse_size("10G") == 10 * GIB


# --- Several volumes -----------------------------------------------------------------------------------------------------------


def test_several_volumes(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        fvd.provision(f"file:{name}", "1G")
    code, out, err = said(capsys, "info", "file:a", "file:c", "file:b")
    assert code == 3 and err.count("\n") == 1
    assert [line for line in out.splitlines() if line.startswith("file:")] == [f"file:{workdir}/a", f"file:{workdir}/b"]
    code, out, _ = said(capsys, "check", "file:a", "file:c", "file:b", "--output", "json")
    answer = json.loads(out)
    assert (code, set(answer)) == (3, {"schema_version", "volumes"})
    assert [next(iter(volume)) for volume in answer["volumes"]] == ["volume"] * 3
    assert answer["volumes"][1]["error"]["exit_code"] == 3
    (workdir / "a").write_bytes(b"something else")
    code, out, _ = said(capsys, "remove", "file:a", "file:b", "file:c")
    assert (code, out) == (4, "file:b: removed\nfile:c: nothing to remove: there was no disk\n")
    assert (workdir / "a").read_bytes() == b"something else" and not (workdir / "b").exists()


def test_one_volume_answers_as_ever(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fvd.provision("file:a", "1G")
    for command, key in (("info", "virtual_size"), ("check", "errors"), ("remove", "removed")):
        assert key in json.loads(said(capsys, command, "file:a", "--output", "json")[1])
    answer = json.loads(said(capsys, "info", "file:a", "--output", "json")[1])
    assert answer["error"]["volume"] == "file:a"


# --- Sizes and bases -----------------------------------------------------------------------------------------------------------


def test_the_size_is_the_bases(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "base").write_bytes(bytes(3_000_001))
    for created in (True, False):  # the same again is fine
        code, out, _ = said(capsys, "provision", "file:a", "--base", "base", "--output", "json")
        answer = json.loads(out)
        assert (code, answer["virtual_size"], answer["created"]) == (0, 3_000_320, created)
    code, _, err = said(capsys, "provision", "file:b")
    assert code == 2 and "--size 100G" in err and not (workdir / "b").exists()


def test_a_disk_smaller_than_its_base(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "base").write_bytes(bytes(3 << 20))
    words = ("provision", "file:a", "--size", "2M", "--base", "base")
    code, _, err = said(capsys, *words)
    assert code == 2 and "--truncate-base" in err and not (workdir / "a").exists()
    assert said(capsys, *words, "--truncate-base")[0] == 0
    assert said(capsys, *words)[0] == 0, "it is there already"


def test_another_size_is_answered_with_the_way_to_it(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fvd.provision("file:a", "1G")
    code, _, err = said(capsys, "provision", "file:a", "--size", "2G")
    assert code == 4 and "serve this one --read-only" in err and "--base" in err and "--prefetch on" in err
    assert "emove" not in err
    code, _, err = said(capsys, "provision", "file:a", "--size", "1G", "--block-size", "4K")
    assert code == 4 and "emove" not in err


def test_the_way_to_another_size_works(workdir: Path) -> None:
    fvd.provision("file:a", "8M")
    with fvd.open("file:a") as disk:
        disk.pwrite(4096, b"kept")
    with fvd.serve("file:a", socket="a.sock", read_only=True) as served:
        fvd.provision("file:b", "16M", base=served.uri, prefetch=True)
        with fvd.open("file:b", prefetch=fvd.PrefetchOptions(delay_s=0)) as larger:
            assert bytes(larger.pread(4096, 4)) == b"kept"
            while larger.prefetch_status().state != "done":
                pass


# --- Addresses, lists, testers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "usable", "everywhere"),
    [
        ("nbd://0.0.0.0:10809/vm1", "nbd://127.0.0.1:10809/vm1", True),
        ("nbd://[::]:7/vm1", "nbd://[::1]:7/vm1", True),
        ("nbd://10.0.0.1:7/vm1", "nbd://10.0.0.1:7/vm1", False),
        ("nbd://0.0.0.0/vm1", "nbd://127.0.0.1/vm1", True),
        ("nbd://[::1/vm1", "nbd://[::1/vm1", False),
        ("nbd+unix:///vm1?socket=/0.0.0.0", "nbd+unix:///vm1?socket=/0.0.0.0", False),
    ],
)
def test_an_address_that_a_client_can_go_to(uri: str, usable: str, everywhere: bool) -> None:
    assert reachable(uri) == (usable, everywhere)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_what_is_given_to_a_machine_names_a_host(workdir: Path, host: str) -> None:
    fvd.provision("file:a", "8M")
    try:
        server = fvd.serve("file:a", listen=f"{host}:0")
    except FvdError:
        pytest.skip("no IPv6 here")
    with server:
        found = describe(server.info())
    assert host.strip("[]") not in (found.blockdev["server"]["host"], found.uri)
    assert "name='::'" not in found.libvirt_xml and "0.0.0.0" not in found.libvirt_xml
    assert any("listens on every address" in note for note in found.notes)


def test_the_list_shows_a_possible_loss(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    fvd.provision("file:a", "8M")
    [listed] = fvd.list_volumes(".")
    assert listed.info is not None
    lost = replace(listed, info=replace(listed.info, possible_loss=fvd.PossibleLoss(1, "log_missing", "gone")))
    assert "writes may be lost" in list_volumes.describe(Listing([lost], []).volumes)[1]
    assert "lost" not in list_volumes.describe([listed])[1]


def test_a_tester_that_played_nothing_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fvd.sim.torture import Tally

    monkeypatch.setattr("fvd.sim.torture.torture", lambda seed, **_: Tally(first_seed=seed))
    code, out, err = said(capsys, "torture", "--seed", "1", "--worlds", "1")
    assert code == torture.EXIT_NOTHING and "nothing was played" in err and "nothing found" not in out


# --- Every message -------------------------------------------------------------------------------------------------------------


def messages() -> Iterator[tuple[Path, ast.AST]]:
    """Where the sources raise something."""
    for path in sorted((ROOT / "fvd").rglob("*.py")):
        if "sim" in path.parts:  # of the tester, for who reads its code
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                yield path, node


def test_no_message_shows_python() -> None:
    wrong = []
    for path, node in messages():
        for part in ast.walk(node):
            shown = part.conversion == ord("r") if isinstance(part, ast.FormattedValue) else False
            named = isinstance(part, ast.Attribute) and part.attr in ("__name__", "__class__", "__qualname__")
            called = isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "repr"
            if (shown or named or called) and isinstance(part, ast.expr | ast.stmt | ast.FormattedValue):
                wrong.append(f"{path.relative_to(ROOT)}:{part.lineno}")
    for path in (ROOT / "fvd").rglob("*.p[yx][xi]"):  # Cython, which Python cannot parse
        if "sim" not in path.parts:
            wrong += [f"{path.relative_to(ROOT)}:{number}" for number, line in enumerate(path.read_text().splitlines(), 1) if "!r}" in line]
    assert wrong == [], "show it by fvd.errors.quoted"


def test_what_is_quoted_cannot_harm_a_terminal() -> None:
    assert quoted("a\x1b[31m\udcff'") == "'a?[31m?''"
    assert quoted(b"x") == "'x'" and quoted(7) == "7" and quoted(None) == "None"
    assert quoted(KeyError("lv_size")) == "lv_size" and quoted(OSError(errno.ENOENT, "No such file")) == "No such file"


ADVICE_THAT_LOSES = re.compile(r"(?i)\bremove it first|not, wipefs --all|; remove it\b|or remove something|delete it")


def test_no_message_advises_to_lose_data() -> None:
    for path in (ROOT / "fvd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not ADVICE_THAT_LOSES.search(node.value), f"{path}:{node.lineno}: {node.value}"


def test_every_type_of_an_argument_is_ours() -> None:
    """argparse's own words for a wrong number are Python's."""
    for parser in cast(Any, build_parser()).commands.values():
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.type not in (int, float), action.option_strings
