"""The images and manifests of the docs, as linters read them."""

from __future__ import annotations

import re
import shutil
import subprocess
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
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is missing")
    files = [ROOT / "Dockerfile"]
    for number, block in enumerate(blocks("dockerfile")):
        files.append(tmp_path / f"{number}.Dockerfile")
        files[-1].write_text(block)
    assert len(files) > 1
    done = subprocess.run(["hadolint", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_kubernetes_manifests() -> None:
    linter = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    found: list[Any] = [one for block in blocks("yaml") for one in yaml.safe_load_all(block)]
    assert {one["kind"] for one in found} == {"Deployment", "Service", "Job"}
    for one in found:
        linter.validate(one, linter.latest_version(), strict=True)
