"""The images and manifests of the docs, as linters read them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.paths import DOCS, ROOT


def blocks(language: str) -> list[str]:
    found = [
        re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        for page in sorted(DOCS.glob("*.md"))
    ]
    return [block for page in found for block in page]


def test_dockerfiles(tmp_path: Path) -> None:
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    linter = shutil.which("hadolint", path=os.pathsep.join(places))
    if linter is None:
        pytest.skip("hadolint is missing")
    files = [ROOT / "Dockerfile"]
    for number, block in enumerate(blocks("dockerfile")):
        files.append(tmp_path / f"{number}.Dockerfile")
        files[-1].write_text(block)
    assert len(files) > 1
    done = subprocess.run([linter, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_kubernetes_manifests() -> None:
    linter = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    found: list[Any] = [one for block in blocks("yaml") for one in yaml.safe_load_all(block)]
    assert {one["kind"] for one in found} == {"Deployment", "Service", "Job"}
    for one in found:
        linter.validate(one, linter.latest_version(), strict=True)
