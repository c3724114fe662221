"""The generated card: its facts are the guard's, and no guard can write on it."""

from __future__ import annotations

import contextlib
import json
import random
import re
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from tests import checkpoint, fuzz, tiny
from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.artifact.model_card import CARD_FILE, MARK, card
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import load
from vlm_safeguard.utils.stats import wilson

# What may be on the page: everything else, links and pictures above all, is somebody's injection.
OUR_LINKS = {"https://arxiv.org/abs/2502.10486"}
OUR_TAGS = {"h1", "h2", "p", "a", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"}
OUR_TAGS |= {"ul", "li"}

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "](javascript:alert(1))",
    "[x](https://evil.example)", "![x](https://evil.example/p.png)", "https://evil.example",
    "www.evil.example", "me@evil.example", "` <b>x</b> `", "``` <b>x</b> ```", "| a | b |",
    "\\`<b>x</b>", "# Heading", "- item", "---", "{{ x }}", "${x}", "&lt;b&gt;", "&#60;b&#62;",
    "<!-- x", "--> <b>", "[x]: https://evil.example", "*x* __x__ ~~x~~", "$$x$$", "\u202egnp.exe",
    "x" * 256, "\u200b\u00ad", " ", "", "<a href='https://evil.example'>x</a>", "name: x",
    "license: mit", "'\"", "%s", "`" * 50, "x\\", "|\\|`|",
]  # fmt: skip


def render(page: str) -> str:
    """HTML of the page as a lenient viewer shows it: raw HTML and bare addresses live."""
    body = page.split("---\n", 2)[2].replace(MARK, "")
    reader = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    return reader.render(body)


class Inspector(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: set[str] = set()
        self.words: list[str] = []
        self.feed(render(page))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert {name for name, _ in attributes} <= {"href", "class"}
        self.links |= {value for name, value in attributes if name == "href"}

    def handle_data(self, data):
        self.words.append(data)


def config(kind="restore", **changes) -> GuardConfig:
    raw = json.loads(fuzz.sound(kind)[0])
    return GuardConfig.model_validate(raw | changes)


def front_matter(page: str) -> dict:
    return yaml.safe_load(page.split("---\n", 2)[1])


def rows(page: str, title: str) -> list[list[str]]:
    """Cells of the table rows that begin with a title."""
    found = [line for line in page.splitlines() if line.startswith(f"| {title} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_front_matter() -> None:
    facts = front_matter(card(config()))
    assert facts["license"] == "apache-2.0" and facts["library_name"] == "vlm-safeguard"
    assert facts["base_model"] == "tiny-vlm" and "vlm-safeguard" in facts["tags"]
    assert set(facts) == {"license", "library_name", "base_model", "tags"}
    facts = front_matter(card(config(), base_model="llava-hf/llava-1.5-7b-hf"))
    assert facts["base_model"] == "llava-hf/llava-1.5-7b-hf"


def test_the_hubs_own_reader_reads_it() -> None:
    read = ModelCard(card(config())).data
    assert (read.license, read.library_name, read.base_model) == (
        "apache-2.0", "vlm-safeguard", "tiny-vlm",
    )  # fmt: skip


def test_facts_are_on_the_page() -> None:
    settings = config()
    page = card(settings, repo_id="someone/a-guard")
    own = settings.model
    for digest in (own.config_sha256, own.weights_sha256, own.template_sha256):
        assert f"`{digest}`" in page
    assert settings.tensors_sha256 in page and settings.data_sha256["anchors.jsonl"] in page
    assert "6 layers of 12" in page
    assert rows(page, "Type") == [["Type", own.dtype or "not recorded"]]
    assert rows(page, "Layers") == [["Layers", "1-2, 4"]]
    assert rows(page, "Directions per layer") == [["Directions per layer", "3"]]
    assert rows(page, "0")[0] == [
        "0",
        "the text-only pass",
        "0, 3",
        "sum over the layers, of the last state and of the mean over the words, and 1.5 times the "
        "refusal intent, and 2.5 if the model would refuse the text by itself",
        "0.5",
    ]
    assert 'Guard.from_pretrained("someone/a-guard")' in page
    for word in ("smoke test", "no proof of safety", "exact weights", "Intended use"):
        assert word in page


def test_rates_have_wilson_intervals() -> None:
    (row,) = rows(card(config()), "text alone")[:1]
    for cell, count in zip(row[1:3], (5, 1), strict=True):
        rate = wilson(count, 10)
        assert cell == f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]"
    assert row[3] == "10"


def test_a_whole_record() -> None:
    record = {
        "seconds": 12.5,
        "budget": {"false_positives": 0.02, "kl": 0.2},
        "separability": {"blank": {"auc": [0.5, 0.97, 0.9]}},
        "gates": [{"source": "text", "unseen": {"tpr": 0.82, "fpr": 0.01}}],
        "proof": {
            "blank": {"n": 29, "asr_unguarded": 0.2069, "asr_guarded": 0.0},
            "harmless": {"n": 40, "stopped": 2, "kl": 0.031},
            "lookalikes": {"n": 20, "stopped": 3, "kl": 1.2},
            "mcnemar_p": 0.0039,
        },
    }
    page = card(config(calibration=record))
    low, high = wilson(0, 29).low, wilson(0, 29).high
    assert rows(page, "blank image")[0][2] == f"0.0% [{low:.1%}, {high:.1%}]"
    assert rows(page, "blank image")[1] == ["blank image", "0.970", "1", "0.900"]
    assert rows(page, "0")[-1] == ["0", "82.0%", "1.0%"]
    rate = wilson(2, 40)
    assert f"5.0% [{rate.low:.1%}, {rate.high:.1%}] of 40" in page
    rate = wilson(3, 20)
    assert f"15.0% [{rate.low:.1%}, {rate.high:.1%}] of 20" in page
    for fact in ("p = 0.0039", "2.0% false positives", "0.2 nats", "0.031", "12.5 s"):
        assert fact in page


@pytest.mark.parametrize("kind", ["restore", "add"])
def test_every_mode_has_a_card(kind) -> None:
    page = card(config(kind))
    assert f"`{kind}`" in page
    seen = Inspector(page)
    assert seen.tags <= OUR_TAGS and seen.links == OUR_LINKS


def test_the_example_runs(tmp_path) -> None:
    model, folder = checkpoint.save(tmp_path / "vlm"), tmp_path / "guard"
    tiny.always(load(model).model).save_pretrained(folder)
    code = re.search(r"```python\n(.*?)```", (folder / CARD_FILE).read_text(), re.S)
    assert code
    example = code[1].replace("path/to/the/model", str(model))
    example = example.replace("path/to/this/folder", str(folder))
    names = {"image": Image.new("RGB", (32, 32), "gray")}
    exec(example, names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_no_calibration_record() -> None:
    assert "no calibration record" in card(config(calibration={}))


# -- a hostile guard ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_no_text_of_the_guard_becomes_markup(text) -> None:
    settings = config(
        model=config().model.model_dump() | {"name": text},
        data_sha256={text: "0" * 64},
        calibration={
            text: text, "seconds": text, "budget": {text: 1.0}, "separability": {text: text},
            "gates": [text, {"source": text, "unseen": {"tpr": text, "fpr": 0.1}}],
            "proof": {"text": {"n": text, text: text}, "blank": text, "mcnemar_p": text},
        },
    )  # fmt: skip
    plain = Inspector(card(config(calibration=settings.calibration)))
    seen = Inspector(card(settings))
    assert seen.tags <= OUR_TAGS and seen.links == OUR_LINKS
    # The page has the same blocks, so nothing broke out of its cell or line.
    page, reference = card(settings), card(config(calibration=settings.calibration))
    assert page.count("\n## ") == reference.count("\n## ")
    shapes = [
        [line.count("|") for line in one.splitlines() if line.startswith("|")]
        for one in (page, reference)
    ]
    assert shapes[0] == shapes[1]
    assert plain.tags == seen.tags
    facts = front_matter(page)
    assert set(facts) - {"base_model"} == {"license", "library_name", "tags"}
    assert facts["license"] == "apache-2.0"
    assert facts.get("base_model") in (None, text)
    for bad in "<>`|[]*\\\u202e\u200b":
        lines = [line for line in page.splitlines() if "`" in line and bad in line]
        spans = [span for line in lines for span in re.findall(r"`([^`]*)`", line)]
        assert not any(bad in span for span in spans)


def test_random_hostile_records() -> None:
    """Whatever the record holds in place of numbers, a page comes out, with our markup alone."""
    chance = random.Random(0)
    base = json.loads(fuzz.sound("add")[0])
    for _ in range(400):
        record = fuzz.json_aware(fuzz.copied(base["calibration"]), chance)
        with contextlib.suppress(RecursionError):  # nested too deep for a second change
            record = fuzz.json_aware(record, chance)
        if not isinstance(record, dict):
            continue
        settings = config("add").model_copy(update={"calibration": record})
        page = card(settings)
        seen = Inspector(page)
        assert seen.tags <= OUR_TAGS and seen.links == OUR_LINKS
        assert "\ud800" not in page and page.encode()


# -- the file --------------------------------------------------------------------------------------


@pytest.fixture
def guard():
    return Guard.from_bytes(*fuzz.sound("restore"))


def test_the_card_is_written_beside_the_guard_and_never_read(guard, tmp_path) -> None:
    guard.save_pretrained(tmp_path, base_model="org/vlm")
    path = tmp_path / CARD_FILE
    assert path.read_text() == card(guard.config, base_model="org/vlm")
    for other in (b"\xff\xfe", b"---\nlicense: mit\n---", b"x" * (5 << 20)):
        path.write_bytes(other)
        assert Guard.from_pretrained(tmp_path).config == guard.config
    path.unlink()
    assert Guard.from_pretrained(tmp_path).config == guard.config


def test_a_generated_card_is_renewed_and_any_other_left_alone(guard, tmp_path) -> None:
    path = tmp_path / CARD_FILE
    path.write_text("# My project\n")
    guard.save_pretrained(tmp_path)
    assert path.read_text() == "# My project\n"
    path.write_text(card(guard.config, base_model="old/name"))
    guard.save_pretrained(tmp_path)
    assert path.read_text() == card(guard.config)
    edited = card(guard.config).replace(MARK, "") + "My words.\n"
    path.write_text(edited)
    guard.save_pretrained(tmp_path)
    assert path.read_text() == edited


def test_a_readme_that_is_no_file_is_left_alone(guard, tmp_path) -> None:
    (tmp_path / CARD_FILE).mkdir()
    guard.save_pretrained(tmp_path)
    assert (tmp_path / CARD_FILE).is_dir()
    assert Guard.from_pretrained(tmp_path).config == guard.config
