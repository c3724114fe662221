"""Hostile guard files: mutations of sound ones, and what must hold of any that still loads.

python -m tests.fuzz --count 100000 [--seed 0] [--only N]

Prints a JSON summary; exit code 1 if anything but a ``GuardError`` was raised, or a guard was
loaded that breaks one of the rules of ``rules.py``. The rules are written from
docs/guard-format.md with json and numpy, not with the package. Mutation N of a seed is the
same in every run: ``--only N`` repeats it alone.
"""

from tests.fuzz.guards import framed, seeds, sound
from tests.fuzz.mutations import Twice, copied, dump, json_aware, mutation
from tests.fuzz.rules import check_loaded
from tests.fuzz.running import CHECKS, Summary, run

__all__ = [
    "CHECKS",
    "Summary",
    "Twice",
    "check_loaded",
    "copied",
    "dump",
    "framed",
    "json_aware",
    "mutation",
    "run",
    "seeds",
    "sound",
]
