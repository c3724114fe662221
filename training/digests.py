"""Write the digests of the package's data files: ``python -m training.digests``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

DATA = Path(__file__).parents[1] / "src" / "vlm_safeguard" / "data"


def main() -> None:
    found = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(DATA.glob("*.jsonl"))
    }
    target = DATA / "digests.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(target)


if __name__ == "__main__":
    main()
