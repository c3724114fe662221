"""A name in the package stands for one thing."""

import ast
from collections import Counter

from tests.paths import ROOT

# The same thing, done for each engine: transformers in `server`, vLLM in `engines/vllm`.
TWINS = {"self_check.py": 2, "telemetry.py": 2}


def test_no_two_files_or_classes_have_one_name() -> None:
    paths = [p for p in (ROOT / "src").rglob("*.py") if p.name != "__init__.py"]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    files = Counter(path.name for path in paths)
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert {name: n for name, n in files.items() if n > 1} == TWINS
    assert [name for name, n in classes.items() if n > 1] == []
