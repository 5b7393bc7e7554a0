# SPDX-License-Identifier: Apache-2.0
"""Makes tests/fuzz/corpus/corpus.xz from libFuzzer's folders: `python tests/fuzz/keep.py FOLDER`, which has a folder for each target.
`python tests/fuzz/keep.py --unpack FOLDER` is the way back, to begin with what is known.

Of each it keeps the fewest inputs that reach what all of them, and those kept before, reach (libFuzzer's set cover). PYTHONPATH chooses the
build, as for guided.py.
"""

from __future__ import annotations

import hashlib
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHIVE = HERE / "corpus" / "corpus.xz"


def unpack(folder: Path, lines: list[str]) -> None:
    for target, name, text in (line.split(" ") for line in lines):
        (folder / target).mkdir(parents=True, exist_ok=True)
        (folder / target / name).write_bytes(bytes.fromhex(text))


def main() -> None:
    folder = Path(sys.argv[-1])
    lines = lzma.decompress(ARCHIVE.read_bytes()).decode().splitlines() if ARCHIVE.exists() else []
    if sys.argv[1] == "--unpack":
        unpack(folder, lines)
        return
    kept: list[str] = []
    for target in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as new:
            known = Path(old) / target
            known.mkdir()
            unpack(Path(old), [line for line in lines if line.startswith(f"{target} ")])
            subprocess.run([sys.executable, HERE / "guided.py", target, "-set_cover_merge=1", new, known, folder / target], check=True)
            inputs = sorted((path.read_bytes() for path in Path(new).iterdir()), key=lambda data: (len(data), data))
        kept += [f"{target} {hashlib.sha1(data).hexdigest()[:12]} {data.hex()}" for data in inputs]
    kept += [line for line in lines if not (folder / line.split(" ")[0]).is_dir()]
    ARCHIVE.write_bytes(lzma.compress(("\n".join(sorted(kept)) + "\n").encode(), preset=9))


if __name__ == "__main__":
    main()
