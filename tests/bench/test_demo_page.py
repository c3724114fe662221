"""The docs say what the committed results of the demonstration say."""

from __future__ import annotations

import json
import re

import pytest

from bench import demo_page
from vlm_safeguard.utils.stats import wilson

PAGES = {
    "README.md": demo_page.readme,
    "docs/results.md": demo_page.page,
    "src/vlm_safeguard/embedded/qwen25_coder_05b/CARD.md": demo_page.card,
}


@pytest.mark.parametrize("name", PAGES)
def test_the_docs_hold_the_committed_results(name: str) -> None:
    results = json.loads((demo_page.ROOT / "docs/assets/results.json").read_text("utf-8"))
    text = (demo_page.ROOT / name).read_text("utf-8")
    block = text.split(f"{demo_page.START}\n")[1].split(f"\n{demo_page.END}")[0]
    [commit] = set(re.findall(r"commit (\w+\+?)", block, re.IGNORECASE))
    assert block == PAGES[name](results, commit)


def test_what_is_off_the_subject_is_neither_success_nor_refusal() -> None:
    results = json.loads((demo_page.ROOT / "docs/assets/results.json").read_text("utf-8"))
    cells = [
        cell
        for settings in results["benchmarks"].values()
        for systems in settings.values()
        for cell in systems.values()
    ]
    assert all(cell["degenerate"] == cell["empty"] == 0 for cell in cells)
    found = [demo_page._off_subject(cell) for cell in cells]
    left = [cell["asr_n"] - cell["asr_count"] - cell["refused_count"] for cell in cells]
    assert any(found)
    assert found == [count / cell["asr_n"] for count, cell in zip(left, cells, strict=True)]
    counted = wilson(3, 20).as_dict("off_subject_harmful")
    assert demo_page._off_subject(cells[0] | counted) == 3 / 20


def test_nothing_of_the_machine_is_kept() -> None:
    kept = (demo_page.ROOT / "docs/assets/results.json").read_text("utf-8")
    assert not set(demo_page.PATHS) & set(json.loads(kept))
