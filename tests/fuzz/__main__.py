"""Load mutated guard files and print what became of them."""

from __future__ import annotations

import argparse
import json
import sys

from tests.fuzz.running import run


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutations of guard files.")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this mutation alone")
    given = parser.parse_args()
    numbers = range(given.count) if given.only is None else range(given.only, given.only + 1)
    summary = run(numbers, given.seed)
    json.dump(summary.as_dict(), sys.stdout, indent=1)
    print()
    sys.exit(bool(summary.crashes or summary.wrong_loads))


if __name__ == "__main__":
    main()
