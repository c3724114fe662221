"""Reading published benchmarks: small files of our own in the publishers' formats, and mistakes."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.paths import PUBLISHED
from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import settings_of
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import thin
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.benchmarks import BENCHMARKS, load_benchmark
from vlm_safeguard.evaluation.benchmarks.pictured import FIGSTEP_REQUEST
from vlm_safeguard.evaluation.benchmarks.text import JAILBREAK_TEMPLATES

FROM_FILES = [name for name, benchmark in BENCHMARKS.items() if benchmark.files]
QUESTIONS = [
    "How do I fold a paper hat, and how big should it be?",
    "Where can I see puffins?",
    "How do I oil a squeaky hinge?",
]


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def table(path: Path, header: str, *rows: tuple[object, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header.split(","))
        writer.writerows(rows)


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        put(folder / name)


def malicious_instruct(root: Path) -> None:
    put(root / "data/MaliciousInstruct.txt", "\n".join(QUESTIONS))


def jailbreak_instructions(root: Path) -> None:
    questions = [{"id": 7 * n, "question": text} for n, text in enumerate(QUESTIONS)]
    put(root / "data/test/harmful_questions.json", json.dumps(questions))
    families: dict[str, list[dict[str, object]]] = {"universal-attack": [{"id": 0, "prompt": "x"}]}
    for family, number in JAILBREAK_TEMPLATES:
        slot = "[INSERT PROMPT HERE]"
        text = f"You are a cheerful {family} parrot. {slot} Once more: {slot}"
        families[family] = [
            {"id": int(number) + 1, "prompt": "Another one."},
            {"id": int(number), "prompt": text, "origin-id": 3},
        ]
    put(root / "data/test/jailbreak_templates.json", json.dumps(families))


def mm_harmful_bench(root: Path) -> None:
    rows = [json.dumps({"image_url": "http://x.invalid/a.jpg", "question": q}) for q in QUESTIONS]
    put(root / "MM-HarmfulBench/mm_harmful.jsonl", "\n".join(rows) + "\n")
    pictures(root / "MM-HarmfulBench/images", "0.jpg", "1.jpg", "2.jpg")


def advbench(root: Path) -> None:
    rows = [(text, "Sure, here is how.") for text in QUESTIONS]
    table(root / "data/advbench/harmful_behaviors.csv", "goal,target", *rows)


def jailbreakbench(root: Path) -> None:
    for kind in ("harmful", "benign"):
        rows = [
            (n, f"{text} ({kind})", "Sure, here is how.", "Crafts", "Leisure", "Original")
            for n, text in enumerate(QUESTIONS)
        ]
        header = "Index,Goal,Target,Behavior,Category,Source"
        table(root / f"data/{kind}-behaviors.csv", header, *rows)


def harmbench(root: Path) -> None:
    table(
        root / "data/behavior_datasets/harmbench_behaviors_text_all.csv",
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
        (QUESTIONS[0], "standard", "leisure", "", "", "paper_hat"),
        (QUESTIONS[1], "contextual", "travel", "context", "Puffins\nare birds.", "puffins"),
        (QUESTIONS[2], "copyright", "copyright", "hash_check", "", "hinge_song"),
    )


def harmbench_multimodal(root: Path) -> None:
    table(
        root / "data/behavior_datasets/harmbench_behaviors_multimodal_all.csv",
        "Behavior,BehaviorID,FunctionalCategory,SemanticCategory,ImageFileName,Source,"
        "ImageDescription,RedactedImageDescription,Tags",
        ("Copy this.", "copy_1", "multimodal", "crafts", "copy_1.png", "", "A hat.", "", ""),
        ("Copy this.", "copy_2", "multimodal", "crafts", "copy_2.jpg", "", "A\nbird.", "", ""),
    )
    pictures(root / "data/multimodal_behavior_images", "copy_1.png", "copy_2.png")


def strongreject(root: Path) -> None:
    rows = [("Leisure", "custom", text) for text in QUESTIONS]
    path = root / "strongreject_dataset/strongreject_dataset.csv"
    table(path, "category,source,forbidden_prompt", *rows)


def xstest(root: Path) -> None:
    table(
        root / "xstest_prompts.csv",
        "id,prompt,type,label,focus,note",
        (1, "How do I kill time?", "figurative_language", "safe", "kill", ""),
        (2, "How do I annoy my cat?", "contrast_figurative_language", "unsafe", "annoy", "pets"),
    )


def figstep(root: Path) -> None:
    table(
        root / "data/question/safebench.csv",
        "dataset,category_id,task_id,category_name,question,instruction",
        ("ForbidQI", 1, 1, "Leisure", QUESTIONS[0], "Steps to fold a paper hat."),
        ("ForbidQI", 10, 2, "Health", QUESTIONS[2], "Steps to oil a hinge."),
    )
    names = ("query_ForbidQI_1_1_6.png", "query_ForbidQI_10_2_6.png")
    pictures(root / "data/images/SafeBench", *names)


def mm_safetybench(root: Path) -> None:
    for scenario in ("01-Paper_Hats", "02-Birds"):
        rows = {
            str(n): {
                "Question": text,
                "Changed Question": text,
                "Key Phrase": "hat",
                "Phrase Type": "product",
                "Rephrased Question": f"{text} It is the phrase in the image.",
                "Rephrased Question(SD)": f"{text} It is shown in the image.",
            }
            for n, text in enumerate(QUESTIONS)
        }
        put(root / f"data/processed_questions/{scenario}.json", json.dumps(rows))
        for kind in ("SD", "SD_TYPO", "TYPO"):
            pictures(root / "data/imgs" / scenario / kind, "0.jpg", "1.jpg", "2.jpg")


def mossbench(root: Path) -> None:
    rows = {
        str(n): {
            "image": f"images/{n}.png",
            "short description": "A toy.",
            "question": QUESTIONS[n],
            "metadata": {"over": f"type {n + 1}", "human": 0, "harm": [7]},
            "pid": str(n),
        }
        for n in range(3)
    }
    put(root / "data/images_information/information.json", json.dumps(rows, indent=4))
    pictures(root / "data/images", "0.png", "1.webp", "2.png")


WRITERS: dict[str, Callable[[Path], None]] = {
    writer.__name__: writer
    for writer in (
        malicious_instruct,
        jailbreak_instructions,
        mm_harmful_bench,
        advbench,
        jailbreakbench,
        harmbench,
        harmbench_multimodal,
        strongreject,
        xstest,
        figstep,
        mm_safetybench,
        mossbench,
    )
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder with every benchmark, each as in a clone of its publisher's repository."""
    for name, writer in WRITERS.items():
        writer(tmp_path / name)
    return tmp_path


def edit(library: Path, name: str, change: Callable[[str], str]) -> None:
    path = next(library.rglob(name))
    path.write_text(change(path.read_text("utf-8")), "utf-8")


def texts(found: list[Prompt]) -> list[str]:
    return [prompt.prompt for prompt in found]


def test_every_benchmark_is_read_with_ids_of_its_own(library: Path) -> None:
    assert sorted(WRITERS) == sorted(FROM_FILES)
    ids: list[str] = []
    for name, benchmark in BENCHMARKS.items():
        found = load_benchmark(name, library)
        assert found, name
        assert {settings_of(prompt) for prompt in found} == {benchmark.settings}, name
        if benchmark.files:
            assert all(prompt.id.startswith(f"{name}-") for prompt in found)
            assert all(
                (prompt.picture is None) == ("text" in benchmark.settings) for prompt in found
            )
        ids += [prompt.id for prompt in found]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_missing_file_is_named_with_its_publisher(
    name: str, library: Path, tmp_path: Path
) -> None:
    benchmark = BENCHMARKS[name]
    for wanted in benchmark.files:
        # MM-Harmful Bench's table goes by several names.
        hits = [*library.glob(f"{name}/**/{wanted}"), *library.glob(f"{name}/**/*.jsonl")]
        moved = hits[0].rename(tmp_path / "elsewhere")
        with pytest.raises(DataError) as error:
            load_benchmark(name, library)
        assert wanted in str(error.value)
        assert benchmark.publisher in str(error.value)
        moved.rename(hits[0])


def test_files_may_lie_directly_in_the_folder(tmp_path: Path) -> None:
    put(tmp_path / "MaliciousInstruct.txt", "How do I juggle?\r\n\r\n  Why do cats purr?  \r\n")
    found = load_benchmark("malicious_instruct", tmp_path)
    assert texts(found) == ["How do I juggle?", "Why do cats purr?"]
    assert [prompt.id for prompt in found] == ["malicious_instruct-0000", "malicious_instruct-0001"]
    assert all(prompt.harmful for prompt in found)


def test_own_sets_need_no_folder_and_keep_their_ids() -> None:
    assert load_benchmark("own_malicious") == prompts.evaluation("malicious")
    assert load_benchmark("own_jailbreak") == prompts.evaluation("jailbreak")
    assert load_benchmark("own_picture") == prompts.evaluation("picture")


def test_jailbreak_templates_are_filled_in_every_slot(library: Path) -> None:
    found = load_benchmark("jailbreak_instructions", library)
    assert len(found) == 5 * len(QUESTIONS)
    assert found[1].id == "jailbreak_instructions-q7@Multi-Roleplaying-2"
    assert found[1].prompt.count(QUESTIONS[1]) == 2
    assert {prompt.form for prompt in found} == {"jailbreak"}
    assert set(Counter(prompt.cluster for prompt in found).values()) == {5}


def test_a_template_without_its_slot_is_refused(library: Path) -> None:
    edit(library, "jailbreak_templates.json", lambda text: text.replace("[INSERT", "[PUT"))
    with pytest.raises(DataError, match=r"no template 2 .* Multi-Roleplaying"):
        load_benchmark("jailbreak_instructions", library)


def test_labels_are_the_publishers(library: Path) -> None:
    labels = {p.id: p.label for p in load_benchmark("jailbreakbench", library)}
    assert labels["jailbreakbench-harmful-1"] == "harmful"
    assert labels["jailbreakbench-benign-1"] == "harmless"
    found = load_benchmark("xstest", library)
    assert [p.label for p in found] == ["harmless", "harmful"]
    assert {p.label for p in load_benchmark("mossbench", library)} == {"harmless"}


def test_xstest_of_the_second_version_gives_the_same_prompts(library: Path) -> None:
    now = load_benchmark("xstest", library)
    (library / "xstest/xstest_prompts.csv").unlink()
    table(
        library / "xstest/xstest_v2_prompts.csv",
        "id_v1,id_v2,type,prompt,focus,note",
        ("v1-9", "v2-1", "figurative_language", "How do I kill time?", "kill", ""),
        ("", "v2-2", "contrast_figurative_language", "How do I annoy my cat?", "annoy", ""),
    )
    assert load_benchmark("xstest", library) == now


def test_harmbench_puts_the_context_first(library: Path) -> None:
    found = load_benchmark("harmbench", library)
    assert texts(found)[:2] == [QUESTIONS[0], f"Puffins\nare birds.\n\n---\n\n{QUESTIONS[1]}"]
    assert [p.intent for p in found] == ["leisure", "travel", "copyright"]


def test_pictures_are_files_that_are_there(library: Path) -> None:
    for name in FROM_FILES:
        for prompt in load_benchmark(name, library):
            if prompt.picture is not None:
                assert dict(prompt.picture)["kind"] == "file"
                assert Path(dict(prompt.picture)["value"]).is_file()
    second = load_benchmark("mm_harmful_bench", library)[1]
    assert Path(dict(second.picture or ())["value"]).name == "1.jpg"


def test_a_picture_is_found_under_the_suffix_it_was_converted_to(library: Path) -> None:
    second = load_benchmark("harmbench_multimodal", library)[1]
    assert Path(dict(second.picture or ())["value"]).name == "copy_2.png"
    second = load_benchmark("mossbench", library)[1]
    assert Path(dict(second.picture or ())["value"]).name == "1.webp"


def test_figstep_asks_the_same_of_every_picture(library: Path) -> None:
    found = load_benchmark("figstep", library)
    assert texts(found) == [FIGSTEP_REQUEST] * 2
    assert [prompt.id for prompt in found] == ["figstep-1-1", "figstep-10-2"]


def test_mm_safetybench_pairs_each_picture_with_its_wording(library: Path) -> None:
    found = load_benchmark("mm_safetybench", library)
    assert len(found) == 2 * len(QUESTIONS) * 3
    by_id = {prompt.id: prompt for prompt in found}
    drawn, printed = (by_id[f"mm_safetybench-02-1@{kind}"] for kind in ("SD", "SD_TYPO"))
    assert drawn.prompt.endswith("It is shown in the image.")
    assert printed.prompt.endswith("It is the phrase in the image.")
    assert drawn.cluster == printed.cluster
    assert Path(dict(printed.picture or ())["value"]).parts[-3:] == ("02-Birds", "SD_TYPO", "1.jpg")


def test_a_missing_picture_is_named(library: Path) -> None:
    (library / "mm_safetybench/data/imgs/02-Birds/TYPO/2.jpg").unlink()
    with pytest.raises(DataError, match=r"02-Birds/TYPO/2\.jpg is missing; get it from https"):
        load_benchmark("mm_safetybench", library, limit=1)


@pytest.mark.parametrize("name", ["../../secret.png", "/secret.png"])
def test_a_picture_outside_the_folder_is_refused(name: str, library: Path) -> None:
    edit(library, "information.json", lambda text: text.replace("images/0.png", name))
    with pytest.raises(DataError, match="lies outside"):
        load_benchmark("mossbench", library)


def test_unknown_benchmark_and_folder() -> None:
    with pytest.raises(DataError, match=r"no benchmark advbensch; there are .*advbench, jailb"):
        load_benchmark("advbensch")
    with pytest.raises(DataError, match=r"harmful_behaviors\.csv .*llm-attacks: name the folder"):
        load_benchmark("advbench")
    with pytest.raises(DataError, match="there is no folder nowhere"):
        load_benchmark("advbench", Path("nowhere"))
    with pytest.raises(DataError, match="a limit of 0"):
        load_benchmark("own_malicious", limit=0)


def test_wrong_columns_are_named_with_those_found(library: Path) -> None:
    edit(library, "harmful_behaviors.csv", lambda text: text.replace("goal,", "request,"))
    with pytest.raises(DataError, match=r"no column goal: wanted goal, found request, target"):
        load_benchmark("advbench", library)
    edit(library, "mm_harmful.jsonl", lambda text: text.replace('"question"', '"query"'))
    with pytest.raises(DataError, match=r"line 1: no column question: .* found image_url, query"):
        load_benchmark("mm_harmful_bench", library)
    edit(library, "information.json", lambda text: text.replace('"over"', '"kind"'))
    with pytest.raises(DataError, match="question 0, metadata: no column over"):
        load_benchmark("mossbench", library)


def test_column_names_in_another_case_are_the_same(library: Path) -> None:
    before = load_benchmark("jailbreakbench", library)
    for kind in ("harmful", "benign"):
        edit(
            library, f"{kind}-behaviors.csv", lambda text: text.replace("Index,Goal", "index,goal")
        )
    assert load_benchmark("jailbreakbench", library) == before


def test_exchanged_headings_do_not_make_prompts_of_answers(library: Path) -> None:
    swap = lambda text: text.replace("goal,target", "target,goal")  # noqa: E731
    edit(library, "harmful_behaviors.csv", swap)
    with pytest.raises(DataError, match="exchange the two headings"):
        load_benchmark("advbench", library)


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_refused(text: str, tmp_path: Path) -> None:
    put(tmp_path / "MaliciousInstruct.txt", text)
    with pytest.raises(DataError, match="has no prompts"):
        load_benchmark("malicious_instruct", tmp_path)


@pytest.mark.parametrize("text", ["", "goal,target\n"])
def test_an_empty_table_is_refused(text: str, tmp_path: Path) -> None:
    put(tmp_path / "harmful_behaviors.csv", text)
    with pytest.raises(DataError, match=r"is empty|has no prompts"):
        load_benchmark("advbench", tmp_path)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (" ,Sure.", "line 3: nothing in goal"),
        ("one", "line 3: 1 cells where the header names 2"),
        ("one,two,three", "line 3: 3 cells"),
        ('"cut short', "line 3: broken CSV"),
    ],
)
def test_a_broken_row_is_named_by_its_line(row: str, complaint: str, tmp_path: Path) -> None:
    put(tmp_path / "harmful_behaviors.csv", f"goal,target\nHow do I juggle?,Sure.\n{row}\n")
    with pytest.raises(DataError, match=complaint):
        load_benchmark("advbench", tmp_path)


def test_text_that_is_not_utf8_is_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    path = tmp_path / "harmful_behaviors.csv"
    path.write_bytes("goal,target\nOù est le café?,Sure.\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_benchmark("advbench", tmp_path)
    path.write_bytes("goal,target\nOù est le café?,Sure.\n".encode("utf-8-sig"))
    assert texts(load_benchmark("advbench", tmp_path)) == ["Où est le café?"]


def test_broken_json_is_named_by_its_line(library: Path) -> None:
    edit(library, "information.json", lambda text: text.replace('"pid": "0"', '"pid" "0"'))
    line = next(library.rglob("information.json")).read_text("utf-8").split('"pid" "0"')[0]
    with pytest.raises(DataError, match=rf"line {line.count(chr(10)) + 1}: broken JSON"):
        load_benchmark("mossbench", library)
    edit(library, "mm_harmful.jsonl", lambda text: text.replace("puffins", 'puf"fins'))
    with pytest.raises(DataError, match="line 2: broken JSON"):
        load_benchmark("mm_harmful_bench", library)


def test_json_of_another_shape_is_refused(library: Path) -> None:
    edit(library, "harmful_questions.json", lambda text: '{"id": 1}')
    with pytest.raises(DataError, match="a list of questions is expected"):
        load_benchmark("jailbreak_instructions", library)
    edit(library, "02-Birds.json", lambda text: "[]")
    with pytest.raises(DataError, match="an object with questions is expected"):
        load_benchmark("mm_safetybench", library)
    edit(library, "information.json", lambda text: text.replace('"pid": "1"', '"pid": null'))
    with pytest.raises(DataError, match="question 1: pid is empty"):
        load_benchmark("mossbench", library)


def test_an_id_used_twice_is_refused(library: Path) -> None:
    edit(library, "harmbench_behaviors_text_all.csv", lambda t: t.replace("puffins", "paper_hat"))
    with pytest.raises(DataError, match="the id harmbench-paper_hat is used twice"):
        load_benchmark("harmbench", library)
    edit(library, "01-Paper_Hats.json", lambda text: text.replace('"1": {', '"0": {'))
    with pytest.raises(DataError, match=r'01-Paper_Hats\.json: an object names "0" twice'):
        load_benchmark("mm_safetybench", library)


def test_an_unknown_xstest_label_is_refused(library: Path) -> None:
    edit(library, "xstest_prompts.csv", lambda text: text.replace(",unsafe,", ",maybe,"))
    with pytest.raises(DataError, match="the label of 2 is maybe"):
        load_benchmark("xstest", library)


def test_a_limit_takes_evenly_of_each_label() -> None:
    whole = load_benchmark("own_malicious")
    part = load_benchmark("own_malicious", limit=4)
    assert Counter(prompt.label for prompt in part) == {"harmful": 4, "harmless": 4}
    harmful = [prompt for prompt in whole if prompt.harmful]
    assert part[:4] == harmful[::25]
    assert sorted(p.id for p in load_benchmark("own_malicious", limit=999)) == sorted(
        p.id for p in whole
    )


def test_a_limit_touches_all_questions_and_all_templates() -> None:
    grid = [
        Prompt(f"q{q}@t{t}", "", "harmful", "jailbreak", str(t), f"q{q}")
        for t in range(5)
        for q in range(20)
    ]
    part = thin(grid, 20)
    assert len({prompt.cluster for prompt in part}) == 20
    assert set(Counter(prompt.intent for prompt in part).values()) == {4}
    assert Counter(thin(grid, 100)) == Counter(grid)
    assert len({prompt.cluster for prompt in thin(grid, 5)}) == 5


def test_benchmarks_name_their_publishers() -> None:
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert benchmark.publisher.startswith("https://") == bool(benchmark.files)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the public benchmarks are not on this machine")
@pytest.mark.parametrize(
    ("name", "clusters"),
    [("malicious_instruct", 100), ("jailbreak_instructions", 20), ("mm_harmful_bench", 100)],
)
def test_the_papers_benchmarks_as_published(name: str, clusters: int) -> None:
    found = load_benchmark(name, PUBLISHED)
    assert len(found) == 100
    assert len({prompt.cluster for prompt in found}) == clusters
    assert all(prompt.harmful and "[INSERT" not in prompt.prompt for prompt in found)
    assert found == load_benchmark(name, PUBLISHED / name)
    assert len(load_benchmark(name, PUBLISHED, limit=20)) == 20
