# SPDX-License-Identifier: Apache-2.0
"""Nothing that comes from outside breaks fvd: not a superblock, map, journal or whole disk, not an NBD client, not a line of text.

Three ways: the inputs that were worth keeping; hypothesis, which makes small examples of what it finds; and atheris, which is led by the
coverage of fvd's Python, and of its compiled modules if there is a fuzz build (`make fuzzed`). `make fuzz` does the last for longer.
"""

from __future__ import annotations

import importlib.util
import logging
import lzma
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hostile import ALL_REGIONS, good_disks, spoil, spoil_log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS, stranger

from fvd.disk.loading import check_slots_fit, load_disk
from fvd.disk.pending import apply_in_memory, parts_to_apply
from fvd.errors import FvdError
from fvd.format import pending

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = os.environ.get("FVD_TEST_BUILD", "release")
FUZZ_TREE = ROOT / "build" / "fuzz"
SLOW_SECONDS = 10
MEMORY_BYTES = 1 << 30
GUIDED_SECONDS = {"image": 6, "journal": 3, "server": 4, "maps": 2, "superblock": 2, "pending": 3, "ring": 3, "front_end": 3}
"""How long each target is guided for; the others say little to coverage."""
TIMES = float(os.environ.get("FVD_FUZZ_TIMES", "1"))  # as long
EXAMPLES = {"image": 150, "server": 60, "pending": 150}


def corpus() -> list[tuple[str, str, bytes]]:
    """(target, name, input) of what is kept: one archive of lines `target name hex`, and every finding as a file of its own."""
    lines = lzma.decompress((HERE / "corpus" / "corpus.xz").read_bytes()).decode().splitlines()
    kept = [(target, name, bytes.fromhex(text)) for target, name, text in (line.split(" ") for line in lines)]
    found = sorted((HERE / "corpus").glob("*.input"))
    return kept + [(path.name.split("-")[0], path.stem, path.read_bytes()) for path in found]


CORPUS = corpus()


@contextmanager
def bounded_memory() -> Iterator[None]:
    """What is done here may add so much memory, and no more."""
    old = resource.getrlimit(resource.RLIMIT_DATA)
    with Path("/proc/self/status").open() as status:
        used_kib = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, ((used_kib << 10) + MEMORY_BYTES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old)


def judge(target: str, data: bytes) -> None:
    began = time.monotonic()
    try:
        TARGETS[target](data)
    except Exception as error:
        error.add_note(f"{target}: {data.hex()}")
        raise
    assert time.monotonic() - began < SLOW_SECONDS, f"{target} is slow: {data.hex()}"


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """The server says for each disk that blocking I/O was asked for."""
    logger = logging.getLogger("fvd")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_were_kept(target: str) -> None:
    inputs = [data for kind, _, data in CORPUS if kind == target]
    assert inputs
    with bounded_memory():
        for data in inputs:
            judge(target, data)


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_breaks_it(target: str) -> None:
    kept = [data for kind, _, data in CORPUS if kind == target]

    @settings(max_examples=EXAMPLES.get(target, 400), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.one_of(st.binary(max_size=80), st.tuples(st.sampled_from(kept), st.integers(0, 80), st.binary(max_size=12)).map(spliced)))
    def run(data: bytes) -> None:
        judge(target, data)

    with bounded_memory():
        run()


def spliced(parts: tuple[bytes, int, bytes]) -> bytes:
    """A kept input with some bytes of it replaced."""
    kept, at, new = parts
    return kept[:at] + new + kept[at + len(new) :]


def test_the_inputs_get_past_the_checksums() -> None:
    """Else everything above would be about checksums only: spoilt disks are accepted, and refused, for each reason there is."""
    verdicts: set[str] = set()
    for kind, _, data in CORPUS:
        if kind == "image":
            try:
                load_disk(spoil(data, ALL_REGIONS)[1])
                verdicts.add("accepted")
            except FvdError as error:
                verdicts.add(str(error))
    for reason in (
        "accepted", "checksum mismatch", "the sizes give", "unknown incompatible", "has been cut off", "is damaged or does not belong",
        "the maps do not have", "the maps have hash", "no commit begins", "another chunk has it too", "has no slot, but", "cross the end",
        "slots at most", "changes a word or entry", "cannot have been reached", "past the tail",
    ):  # fmt: skip
        assert any(reason in verdict for verdict in verdicts), f"no kept input is judged: {reason}"


def test_the_inputs_get_past_the_header_of_a_log() -> None:
    """Spoilt logs are applied, in one part and in two, left alone, and refused for each reason there is."""
    verdicts: set[str] = set()
    for kind, _, data in CORPUS:
        if kind == "pending":
            hostile = spoil_log(data)
            try:
                found = pending.read(hostile.buffer, hostile.good.geometry, hostile.identity)
                disk = hostile.disk
                parts = parts_to_apply(found, disk.geometry, disk.superblock.uuid, disk.bitmap.copy(), disk.table)
                verdicts.add("failed" if found.failed_errno else f"{len(parts)} parts")
                bitmap, table = disk.bitmap.copy(), None if disk.table is None else disk.table.copy()
                check_slots_fit(
                    disk.geometry, apply_in_memory(parts, disk.geometry, bitmap, table, hostile.good.has_base), hostile.good.size_bytes
                )
            except FvdError as error:
                verdicts.add(str(error))
    for reason in (
        "0 parts", "1 parts", "2 parts", "failed", "has only", "damaged, or none", "which this program does not know", "another disk's",
        "in another place", "does not have the size", "records where", "names a map", "names an entry", "a slot that cannot be",
        "contradicts itself", "does not build on", "another chunk has it too", "has no slot, but", "slots at most", "has been cut off",
    ):  # fmt: skip
        assert any(reason in verdict for verdict in verdicts), f"no kept input is judged: {reason}"


def test_good_disks_are_good() -> None:
    for good in good_disks():
        assert stranger().open_disk(good.storage).uuid == good.uuid


@pytest.mark.parametrize("target", GUIDED_SECONDS)
def test_guided_by_coverage(target: str, tmp_path: Path) -> None:
    """The checked run takes the fuzz build, which is the checked one with AddressSanitizer; the release run its own."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    tree = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    if BUILD == "checked" and any((FUZZ_TREE / "fvd").glob("_core.*.so")):
        tree = FUZZ_TREE
    (tmp_path / "corpus").mkdir()
    for kind, name, data in CORPUS:
        if kind == target:
            (tmp_path / "corpus" / name).write_bytes(data)
    seed = int(os.environ.get("FVD_FUZZ_SEED", "1"))
    seconds = round(GUIDED_SECONDS[target] * TIMES)
    done = subprocess.run(
        [
            # Forked by a small process: the kernel hands the peak memory of whoever forks on, and libFuzzer would take it for its own.
            *("sh", "-c", '"$@"; exit $?', "sh"),
            *(sys.executable, str(HERE / "guided.py"), target, f"-seed={seed}", f"-max_total_time={seconds}", "-max_len=300"),
            *("-len_control=0", f"-timeout={SLOW_SECONDS}", "-rss_limit_mb=3000", "-print_final_stats=1", "corpus"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), os.environ["PYTHONPATH"]])},
        capture_output=True,
        text=True,
        timeout=seconds + 110,
        check=False,
    )
    found = [f"{path.name}: {path.read_bytes().hex()}" for path in tmp_path.glob("*-*") if path.is_file()]
    assert done.returncode == 0 and not found, f"seed {seed} {found}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "stat::number_of_executed_units" in done.stderr
