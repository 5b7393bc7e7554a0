"""Play worlds again from their seeds: ``python -m fvd.sim [--bytes] FIRST [COUNT]``; --bytes: those of bytewise.py.

Prints what each found; exits 1 if any found something.
"""

from __future__ import annotations

import sys

from fvd.sim import bytewise, world


def main(arguments: list[str]) -> int:
    play = world.run
    if arguments[0] == "--bytes":
        play = bytewise.run
        del arguments[0]
    first = int(arguments[0])
    count = int(arguments[1]) if len(arguments) > 1 else 1
    found = 0
    for seed in range(first, first + count):
        try:
            print(f"seed {seed}: {play(seed)} requests, nothing found")
        except Exception as error:
            found += 1
            print(f"seed {seed}: {type(error).__name__}: {error}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
