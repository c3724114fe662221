"""The report: complete, self-contained, harmless to open, and never half written."""

from __future__ import annotations

import base64
import copy
import math
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vlm_safeguard.evaluation.report import (
    AnswerPair,
    PcaCloud,
    ReportData,
    cut_words,
    plot_gap,
    save_png,
    write_report,
)
from vlm_safeguard.evaluation.report import html as page_module
from vlm_safeguard.evaluation.report.plots import plot_candidates, plot_pca, plot_separability
from vlm_safeguard.utils.stats import wilson

LAYERS = 30
N = 120
VOID = {"meta", "source", "img", "br", "link", "hr", "input"}


def rates(attacks: int, refused: int, degenerate: float = 0.0) -> dict[str, Any]:
    asr, over = wilson(attacks, N), wilson(refused, N)
    return {
        "n": N,
        "asr": asr.value,
        "asr_low": asr.low,
        "asr_high": asr.high,
        "over_refusal": over.value,
        "over_refusal_low": over.low,
        "over_refusal_high": over.high,
        "degenerate": degenerate,
    }


def make_summary() -> dict[str, Any]:
    return {
        "settings": {
            "text": {"unguarded": rates(13, 2), "guarded": rates(6, 3), "paper": rates(9, 40)},
            "blank": {
                "unguarded": rates(87, 1),
                "guarded": rates(10, 4),
                "paper": rates(55, 38, 0.125),
            },
            "picture": {"unguarded": rates(79, 0), "guarded": rates(14, 5), "paper": rates(61, 31)},
        },
        "perplexity_ratio": 1.0137,
        "vqa_accuracy": {"unguarded": 0.713, "guarded": 0.708},
        "time_per_token_ratio": 1.041,
        "first_token_ratio": 1.873,
        "note": "Measured on the embedded 135M model, with a keyword judge; larger models differ.",
    }


def make_calibration() -> dict[str, Any]:
    rng = random.Random(1)

    def curve(top: float) -> list[float]:
        rise = [top - (top - 0.55) * math.exp(-i / 5) for i in range(LAYERS)]
        return [round(min(1.0, v + rng.uniform(-0.012, 0.012)), 4) for v in rise]

    table = {
        name: {
            "auc": curve(auc),
            "tpr_b0": [round(tpr * v, 4) for v in curve(1.0)],
            "fpr_b0": [round(fpr * (1 - v / 2), 4) for v in curve(1.0)],
        }
        for name, auc, tpr, fpr in (
            ("text", 0.99, 0.97, 0.2),
            ("blank", 0.94, 0.35, 0.08),
            ("picture", 0.88, 0.28, 0.15),
        )
    }
    fires = {"text": 0.962, "blank": 0.9615, "picture": 0.954}
    false = {"text": 0.009, "blank": 0.0085, "picture": 0.01}
    proof = {
        name: {"n": 48, "asr_unguarded": before / 48, "asr_guarded": after / 48}
        for name, before, after in (("text", 5, 2), ("blank", 36, 3), ("picture", 33, 5))
    }
    return {
        "seconds": 1834.2,
        "budget": {"false_positives": 0.02, "kl": 0.05},
        "separability": table,
        "gates": [
            {"source": "text", "layers": [12, 17, 21], "tpr": fires, "fpr": false},
            {"source": "vlm", "layers": [19], "tpr": {"blank": 0.5}, "fpr": {"blank": 0.005}},
        ],
        "candidates": make_candidates(),
        "proof": {
            **proof,
            "harmless": {"n": 144, "stopped": 2, "kl": 0.00312},
            "mcnemar_p": 3.5e-14,
        },
    }


def make_candidates() -> list[dict[str, Any]]:
    shapes = (
        ("0-29", 64, 3),
        ("10-29", 64, 3),
        ("10-24", 64, 1),
        ("10-29", 16, 3),
        ("10-29", 8, 6),
    )
    common = {"query": "pass", "positions": "generated"}
    steerings = [
        {"mode": "restore", "reference": ref, "layers": la, "rank": r, "tokens": t, "alpha": 0.0}
        for ref in ("text", "anchor")
        for la, r, t in shapes
    ]
    for alpha, rank, tokens in ((1.0, 1, None), (3.0, 1, None), (1.0, 16, 3)):
        steerings.append(
            {"mode": "add", "reference": "text", "layers": "10-29", "rank": rank}
            | {"tokens": tokens, "alpha": alpha, "query": "text"}
        )
    wins = (5, 2, 11, 3, 6, 9, 4, 14, 7, 8, 17, 12, 10)
    found: list[dict[str, Any]] = [
        {"steering": common | steering, "n": 24, "asr": won / 24}
        for steering, won in zip(steerings, wins, strict=True)
    ]
    for place, won in ((1, 11), (3, 8), (6, 19)):
        found[place] |= {"final_n": 96, "final_asr": round(won / 96, 4)}
    return found


def make_pca() -> dict[str, PcaCloud]:
    rng = random.Random(2)

    def cloud(shift: float, gap: float) -> PcaCloud:
        harmful = [i % 2 == 0 for i in range(160)]
        points = [
            (rng.gauss(shift + (gap if bad else -gap), 2.2), rng.gauss(shift / 2, 3.0))
            for bad in harmful
        ]
        return PcaCloud(points, harmful)

    return {
        "text": cloud(0, 6),
        "blank image": cloud(-9, 2),
        "guarded, blank image": cloud(-2, 5.5),
    }


def make_data() -> ReportData:
    long = " ".join(f"word{i}" for i in range(40))
    return ReportData(
        summary=make_summary(),
        calibration=make_calibration(),
        pca=make_pca(),
        examples=[
            AnswerPair(
                "blank", "harmful", "How do I pick the lock?", long, "I can't help with that."
            ),
            AnswerPair(
                "picture", "harmful", "Do <b>this</b> & that", "<script>alert(1)</script>", ""
            ),
            AnswerPair("text", "harmless", "What is a lock made of?", "Steel and brass.", "Brass."),
        ],
        facts={"model": "smol-vlm <embedded>", "commit": "0123abc", "date": "2026-01-02"},
    )


class Page(HTMLParser):
    """Checks that tags nest and collects attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def pictures(self) -> list[str]:
        uris = [v for n, v in self.values if n in ("src", "srcset")]
        return [base64.b64decode(u.split(",", 1)[1], validate=True).decode() for u in uris]


def render(data: ReportData, folder: Path) -> str:
    write_report(data, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(make_data(), tmp_path_factory.mktemp("report"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are built but not drawn: drawing takes most of the time."""
    monkeypatch.setattr(page_module, "_svg", lambda figure: "data:image/svg+xml;base64,")


def test_tags_nest_and_every_part_is_there(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.tags.count("img") == 4
    assert parsed.tags.count("h2") == 8
    assert page.startswith("<!DOCTYPE html>")
    assert "undefined" not in parsed.text


def test_all_numbers_are_on_the_page(page: str) -> None:
    text = Page(page).text
    for models in make_summary()["settings"].values():
        for values in models.values():
            for rate in ("asr", "over_refusal"):
                low, high = values[f"{rate}_low"], values[f"{rate}_high"]
                assert f"{values[rate]:.1%} [{low:.1%}, {high:.1%}]" in text
    calibration = make_calibration()
    for candidate in calibration["candidates"]:
        assert f"{candidate['asr']:.1%} of 24" in text
    for setting in ("text", "blank", "picture"):
        assert f"{calibration['proof'][setting]['asr_guarded']:.1%}" in text
        assert f"{max(calibration['separability'][setting]['auc']):.3f}" in text
    for number in ("1.014", "71.3% → 70.8%", "1.04", "1.87", "12.5%", "3.5e-14", "1834 s"):
        assert number in text
    for number in ("2 of 144", "0.00312 nats", "budget 2.0%", "8.3% of 96", "96.2%", "0.9%"):
        assert number in text
    assert make_summary()["note"] in text
    for name, fact in make_data().facts.items():
        assert name in text and fact in text


def test_headline_states_the_rates(page: str) -> None:
    text = Page(page).text
    assert "8.3% instead of 72.5% with a blank image" in text
    assert "harmless requests refused: 4.2% instead of 0.0% (at worst, with a picture)." in text


def test_the_chosen_candidate_is_the_best_of_the_second_round(page: str) -> None:
    assert "restore to text, layers 10-29, rank 16, 3 tokens (chosen)" in Page(page).text
    assert page.count("(chosen)") == 1


def test_text_of_models_is_escaped(page: str) -> None:
    assert "script" not in Page(page).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;this&lt;/b&gt; &amp; that" in page
    assert "smol-vlm &lt;embedded&gt;" in page


def test_responses_are_cut(page: str) -> None:
    assert "word11 …" in page
    assert "word12" not in page
    assert "(no text)" in page


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", ""),
        ("one two", "one two"),
        (" one\n two  three ", "one two three"),
        ("one two three four", "one two three …"),
        ("答" * 40, "答" * 36 + " …"),
    ],
)
def test_cut_words(text: str, cut: str) -> None:
    assert cut_words(text, 3) == cut


def test_nothing_is_fetched(page: str) -> None:
    parsed = Page(page)
    assert not re.search(r"https?://", page)
    assert not {"link", "script", "iframe"} & set(parsed.tags)
    assert not re.search(r"@import|url\(", page)
    assert len(parsed.pictures) == 8
    for picture in parsed.pictures:
        links = re.findall(r"(?:href|src)\s*=\s*[\"']([^\"']*)", picture)
        assert all(link.startswith("#") for link in links)


def test_the_same_data_gives_the_same_bytes(page: str, tmp_path: Path) -> None:
    assert render(make_data(), tmp_path) == page


def test_nan_does_not_reach_the_page(tmp_path: Path) -> None:
    data = make_data()
    settings = data.summary["settings"]
    settings["blank"]["paper"] = dict.fromkeys(settings["blank"]["paper"], math.nan)
    settings["picture"]["guarded"]["asr_low"] = math.nan
    data.summary["perplexity_ratio"] = math.inf
    data.calibration["separability"]["text"]["auc"][3] = math.nan
    data.calibration["proof"]["mcnemar_p"] = math.nan
    data.calibration["candidates"][0]["asr"] = math.nan
    data.pca["text"].points[0] = (math.nan, 0.0)
    parsed = Page(render(data, tmp_path))
    assert not re.search(r"\b(nan|inf|None)\b", parsed.text, re.IGNORECASE)
    assert not any(re.search(r"\bnan\b", picture) for picture in parsed.pictures)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("part", ["gates", "candidates", "separability", "proof", "budget"])
def test_a_part_of_the_calibration_may_be_missing(part: str, tmp_path: Path) -> None:
    data = make_data()
    del data.calibration[part]
    assert Page(render(data, tmp_path)).open == []


@pytest.mark.usefixtures("undrawn")
def test_optional_numbers_may_be_missing(tmp_path: Path) -> None:
    data = make_data()
    data.summary["vqa_accuracy"] = None
    del data.summary["note"], data.summary["settings"]["picture"]
    for models in data.summary["settings"].values():
        del models["paper"]
    for candidate in data.calibration["candidates"]:
        candidate.pop("final_n", None)
        candidate.pop("final_asr", None)
    text = Page(render(data, tmp_path)).text
    assert "paper's formula" not in text
    assert "picture questions" not in text
    assert "layers 10-29, rank 64, 3 tokens (chosen)" in text


@pytest.mark.usefixtures("undrawn")
def test_nothing_but_a_summary_is_enough(tmp_path: Path) -> None:
    parsed = Page(render(ReportData(summary=make_summary()), tmp_path))
    assert parsed.tags.count("img") == 1
    empty = Page(render(ReportData(summary={}), tmp_path))
    assert "No rates" in empty.text
    assert "img" not in empty.tags


@pytest.mark.usefixtures("undrawn")
def test_half_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    example = AnswerPair("text", "harmless", "x", "broken \ud83d text", "fine")
    data = ReportData(summary=make_summary(), examples=[example])
    assert "broken ? text" in render(data, tmp_path)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_report(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space"):
        write_report(ReportData(summary={}), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stacked", [False, True])
def test_plots_are_legible_and_leave_the_data_alone(stacked: bool, tmp_path: Path) -> None:
    data = make_data()
    before = copy.deepcopy(data)
    figures = [
        plot_gap(data.summary, stacked=stacked),
        plot_pca(data.pca, stacked=stacked),
        plot_separability(data.calibration, stacked=stacked),
        plot_candidates(data.calibration, stacked=stacked),
    ]
    for place, figure in enumerate(figures):
        save_png(figure, tmp_path / f"{place}.png")
        assert (tmp_path / f"{place}.png").read_bytes().startswith(b"\x89PNG")
        texts = [t for axis in figure.axes for t in (*axis.get_xticklabels(), *axis.texts)]
        assert all(t.get_fontsize() >= 8 for t in texts)
    assert data == before


def test_pca_panels_share_their_axes() -> None:
    limits = {(axis.get_xlim(), axis.get_ylim()) for axis in plot_pca(make_pca()).axes}
    assert len(limits) == 1
