"""lmms-eval's results files, in small ones of our own in its format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import run
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.lmms import compare_lmms, lmms_page, read_lmms


def facts(accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "results": {
            "shapes": {
                "alias": " - shapes",
                " ": " ",
                "exact_match,none": accuracy,
                "exact_match_stderr,none": 0.03,
                "exact_match_stderr_clt,none": 0.03,
                "exact_match_stderr_clustered,none": "N/A",
            },
            "captions": {
                "alias": "captions",
                "edits,strict": 1200,
                "edits_stderr,strict": "N/A",
                "edits_stderr_clt,strict": 0.001,
                "submission,none": None,
                "parts,none": [1, 2],
            },
        },
        "configs": {"shapes": {"dataset_path": "a/b", "test_split": "test"}},
        "versions": {"shapes": "Yaml"},
        "n-shot": {"shapes": 0},
        "higher_is_better": {"shapes": {"exact_match": True}, "captions": {"edits": False}},
        "n-samples": {"shapes": {"original": 900, "effective": 250}},
        "model_name": "org/vlm",
    } | more


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write(tmp_path / "plain_results.json", facts(0.6)),
        write(tmp_path / "guarded_results.json", facts(0.58)),
    )


def test_scores_are_read_with_their_errors(both: tuple[Path, Path]) -> None:
    found = read_lmms(both[0])
    assert (found.name, found.model, found.samples) == (
        "plain_results",
        "org/vlm",
        {"shapes": 250},
    )
    assert list(found.scores) == [("shapes", "exact_match,none"), ("captions", "edits,strict")]
    assert found.scores["shapes", "exact_match,none"].error == 0.03
    # The error of a sample's score is not that of the sum beside it.
    assert found.scores["captions", "edits,strict"].error is None
    assert found.left_out == (("captions", "submission,none"), ("captions", "parts,none"))


def test_differences_are_from_the_first_run(both: tuple[Path, Path]) -> None:
    runs = [read_lmms(both[0], "unguarded"), read_lmms(both[1], "guarded")]
    rows = compare_lmms(runs)
    shapes = rows[0]["runs"]
    assert shapes["unguarded"]["difference"] == 0
    assert shapes["guarded"]["difference"] == pytest.approx(-0.02)
    assert shapes["guarded"]["difference_error"] == pytest.approx(0.03 * math.sqrt(2))
    assert rows[1]["runs"]["guarded"]["difference_error"] is None
    page = lmms_page(runs, rows)
    assert "| shapes | exact_match | 250 | 0.6 ± 0.03 | 0.58 ± 0.03 | -0.02 ± 0.042 |" in page
    assert "| captions | edits,strict (lower is better) |  | 1200 | 1200 | +0 |" in page
    assert "left out: captions submission,none, captions parts,none." in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "broken JSON"),
        ('{"results": {"shapes"', "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ([1], "holds no JSON object"),
        ({"plan": {}}, "'results' should hold tasks"),
        ({"results": {"shapes": 0.5}}, "'results' should hold tasks"),
        ({"results": {}}, "no metric with a number"),
        ({"results": {"shapes": {"exact_match,none": "N/A"}}}, "no metric with a number"),
        ('{"results": {"shapes": {"exact_match,none": NaN}}}', "no metric with a number"),
    ],
)
def test_a_file_that_is_no_results_is_named(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"odd\.json.*{message}"):
        read_lmms(write(tmp_path / "odd.json", content))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the results .*no\.json"):
        read_lmms(tmp_path / "no.json")
    with pytest.raises(DataError, match="it is a folder"):
        read_lmms(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n-samples": {"shapes": {"effective": 8}}}, "a has 250 samples, b has 8"),
        ({"n-samples": {}}, "a has 250 samples, b has None"),
        ({"n-shot": {"shapes": 5}}, "number of shots is 0 in a and 5 in b"),
        ({"versions": {"shapes": "2"}}, "version is 'Yaml' in a and '2' in b"),
        ({"configs": {}}, "data set is"),
        ({"results": {"shapes": {"exact_match,none": 1}}}, "only a has captions edits,strict"),
        ({"results": facts(1)["results"] | {"z": {"f1,none": 1}}}, "only b has z f1,none"),
    ],
)
def test_runs_of_something_else_are_not_compared(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    a = read_lmms(write(tmp_path / "a.json", facts(0.6)))
    b = read_lmms(write(tmp_path / "b.json", facts(0.6) | change))
    with pytest.raises(DataError, match=message):
        compare_lmms([a, b])


def test_the_command(both: tuple[Path, Path], tmp_path: Path) -> None:
    files = [path.name for path in both]
    done = run("utility", *files, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| plain_results | guarded_results | difference |" in done.stdout
    names = ["--name", "unguarded", "--name", "guarded"]
    done = run("utility", *files, *names, "--json", cwd=tmp_path)
    assert set(json.loads(done.stdout)["table"][0]["runs"]) == {"unguarded", "guarded"}
    for arguments, message in (
        ([files[0]], "name two results files at least"),
        ([files[0], files[0]], "two results are called 'plain_results'"),
        ([*files, "--name", "unguarded"], "1 name for 2 files"),
    ):
        done = run("utility", *arguments, cwd=tmp_path)
        assert done.returncode == 1 and message in " ".join(done.stderr.split())
        assert done.stdout == ""
