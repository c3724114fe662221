"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PUBLISHED = ROOT.parent / "shared" / "benchmarks"  # benchmarks, where they are on this machine
