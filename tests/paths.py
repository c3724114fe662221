"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LABELS = DOCS / "assets" / "judge-labels.jsonl"
PUBLISHED = ROOT.parent / "shared" / "benchmarks"  # benchmarks, where they are on this machine
