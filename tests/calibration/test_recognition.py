"""How refusals are recognised in calibration, and what happens if they are not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import families
from vlm_safeguard.calibration import calibrate as module
from vlm_safeguard.calibration import recognition
from vlm_safeguard.calibration.attack_trials import refused
from vlm_safeguard.calibration.calibrate import calibrate
from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.calibration.recognition import (
    BY_PHRASES,
    ByJudge,
    ByPhrases,
    ByTokens,
    check_recognises,
)
from vlm_safeguard.cli.calibrating import recogniser_of
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.data.prompts import AnchorPair, calibration
from vlm_safeguard.errors import CalibrationError, DataError, SafeguardError
from vlm_safeguard.evaluation.judges import Judgement
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.refusal_phrases import LANGUAGES, RefusalPhrases
from vlm_safeguard.model.refusals import judge
from vlm_safeguard.utils.progress import Progress

QUIET = Progress(quiet=True)
# Of each language: refusals, and answers that hold some of their words.
SAID = {
    "English": (
        ["I'm sorry, but I can't help with that.", "I cannot assist with this request."],
        ["Sorry for the wait. Sure! Here is how", "A film in which she says that she is sorry."],
    ),
    "German": (
        [
            "Es tut mir leid, aber dabei kann ich nicht helfen.",
            "Ich kann dir dabei nicht helfen.",
            "Leider kann ich diese Frage nicht beantworten.",
        ],
        ["Tut mir leid für die Verspätung. Hier ist die Anleitung:", "Backe das Brot 40 Minuten."],
    ),
    "French": (
        ["Je suis désolé, mais je ne peux pas vous aider.", "Je ne peux pas répondre à cela."],
        ["Désolé pour l'attente. Voici comment faire :", "Le pain doit lever une heure."],
    ),
    "Spanish": (
        ["Lo siento, pero no puedo ayudar con eso.", "No puedo proporcionar esa información."],
        ["Lo siento por la espera. Paso 1: mezcla", "El pan se hornea cuarenta minutos."],
    ),
    "Chinese": (
        ["对不起，我无法协助您完成这个请求。", "抱歉，我不能提供此类信息。"],
        ["抱歉让您久等了，步骤如下：", "面包需要烤四十分钟。"],
    ),
    "Japanese": (
        ["申し訳ありませんが、そのご要望にはお応えできません。", "その情報は提供できません。"],
        ["すみません、お待たせしました。手順は以下の通りです。", "パンは四十分焼きます。"],
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_refusals_are_recognised_in_six_languages(language: str) -> None:
    refusals, answers = SAID[language]
    assert [judge(text) for text in refusals] == ["refused"] * len(refusals)
    assert [judge(text) for text in answers] == ["complied"] * len(answers)


def said(*texts: str) -> list[Response]:
    return [Response(text, 5, False, None) for text in texts]


def test_a_list_of_ones_own_stands_in_for_the_built_in_ones(tmp_path: Path) -> None:
    path = tmp_path / "phrases.txt"
    path.write_text("# Dutch\n\nDaar kan ik niet mee helpen\nHELAAS\n", "utf-8")
    own = ByPhrases(RefusalPhrases.from_file(path))
    answers = said("Helaas, dat gaat niet.", "daar kan ik niet mee helpen", "I'm sorry, no.", "Ja.")
    assert own.refused([], answers) == [True, True, False, False]
    assert BY_PHRASES.refused([], answers) == [False, False, True, False]
    assert own.name.startswith("phrases:") and str(tmp_path) not in own.name
    for content, reason in ((b"# none\n", "no refusal phrase"), (b"\xff\xfe", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            RefusalPhrases.from_file(path)
    with pytest.raises(DataError, match="cannot read the refusal phrases"):
        RefusalPhrases.from_file(tmp_path / "missing")


def test_the_first_tokens_of_refusals_are_learned_and_weighed() -> None:
    """The model is led to begin its answers to harmful questions with one token."""
    loaded = families.llava()
    own, refusal = loaded.model.generate, 70

    def generate(logits_processor: Any = (), **options: Any) -> torch.Tensor:
        harmful = (options["input_ids"] == ord("!") - 30).any(1)

        def lead(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[harmful, refusal] = scores.max() + 20
            return scores

        options["do_sample"] = False
        return own(logits_processor=[lead, *logits_processor], **options)

    loaded.model.generate = generate
    mark = loaded.processor.tokenizer.decode([ord("!") - 30])
    pairs = [AnchorPair(str(n), f"question {n}{mark}", f"question {n}") for n in range(6)]
    found = ByTokens.learned(loaded, pairs, QUIET)
    assert found.openings == (refusal,)
    asked = [Query(f"Why{mark}", None), Query("Why", None)]
    assert refused(loaded, None, asked, 2, recogniser=found) == [True, False]


def test_tokens_that_cannot_be_learned_are_told_with_five_answers() -> None:
    loaded = families.llava()
    same = [AnchorPair(str(n), f"question {n}", f"question {n}") for n in range(7)]
    with pytest.raises(CalibrationError) as caught:
        ByTokens.learned(loaded, same, QUIET)
    first, *shown, last = str(caught.value).split("\n")
    assert "do not begin with tokens of their own" in first and first.endswith("begin:")
    said = respond(loaded, [Query(pair.harmful, None) for pair in same], max_new_tokens=24)
    starts = {one.text.split()[0] for one in said}
    assert len(shown) == 5 and all(line[:4] == "  - " for line in shown)
    assert {line[4:].split()[0] for line in shown} <= starts
    assert "--refusals phrases:FILE" in last and "or a judge" in last


def test_the_probability_is_that_of_the_models_own_first_token() -> None:
    loaded = families.llava()
    items = [Query("Hello", None), Query("What is it?", None)]
    answers = respond(loaded, items, max_new_tokens=2, openings=[40, 41])
    for item, answer in zip(items, answers, strict=True):
        with torch.no_grad():
            logits = loaded.model(**encode(loaded, [item.text], [None])).logits[0, -1]
        logits[loaded.model.generation_config.suppress_tokens] = -torch.inf
        likely = logits.softmax(-1)
        assert answer.first == int(likely.argmax())
        assert answer.opening == pytest.approx(float(likely[[40, 41]].sum()), abs=1e-5)


class Fake:
    """A judge that calls refused what begins with No."""

    name = "fake"

    def __init__(self, asks: str = "refusal", verdicts: Sequence[str | None] = ()) -> None:
        self.asks = asks

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        return [
            Judgement(None, "no answer within 60 s")
            if response == "?"
            else Judgement("refused" if response.startswith("No") else "complied")
            for _, response in pairs
        ]


def test_a_judge_of_ours_recognises_refusals() -> None:
    by = ByJudge(Fake())
    asked = [Query("How?", None)] * 2
    assert by.refused(asked, said("No, never", "Well")) == [True, False]
    with pytest.raises(CalibrationError, match="fake did not judge 1 of 2 answers: no answer"):
        by.refused(asked, said("No", "?"))
    with pytest.raises(CalibrationError, match="tells harm"):
        ByJudge(Fake("harm"))


def test_the_option_of_the_command(tmp_path: Path) -> None:
    assert recogniser_of("phrases") is BY_PHRASES and recogniser_of("tokens") == "tokens"
    (tmp_path / "own.txt").write_text("nee")
    by = recogniser_of(f"phrases:{tmp_path / 'own.txt'}")
    assert by.refused([], said("Nee.", "No, sorry.")) == [True, False]  # type: ignore[union-attr]
    assert recogniser_of("endpoint:http://localhost:1/v1#m").name.startswith("m at")  # type: ignore[union-attr]
    with pytest.raises(CalibrationError, match="tells harm"):
        recogniser_of("endpoint:http://localhost:1/v1#m?family=llama-guard")
    with pytest.raises(
        SafeguardError, match=r"--refusals words: use one of .*phrases.:FILE., .*tokens"
    ):
        recogniser_of("words")


def test_refusals_that_are_not_recognised_stop_calibration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the states of any prompt are recorded, with five answers, cut short."""
    long = "Nee, " + " ".join(f"w{n}" for n in range(20))
    texts = [f"<think>hm</think>{long} {n}" for n in range(23)] + ["<think>endless"]
    monkeypatch.setattr(
        recognition, "respond", lambda _, asked, *__, **___: said(*texts)[: len(asked)]
    )
    monkeypatch.setattr(module, "find_markup", lambda _: None)
    with pytest.raises(CalibrationError) as caught:
        calibrate(None)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "0 of 24 answers to harmful text are recognised as refusals (by phrases)" in message
    assert "1 of them are empty or end within the reasoning" in message
    shown = [line for line in message.splitlines() if line.startswith("  - ")]
    assert len(shown) == 5
    assert shown[0] == "  - Nee, " + " ".join(f"w{n}" for n in range(11)) + " \u2026"
    assert "hm" not in "".join(shown) and "--refusals phrases:FILE" in message
    texts[:5] = ["I'm sorry, I can't help."] * 5
    fit = calibration("fit")
    assert check_recognises(None, BY_PHRASES, fit, 12, QUIET) == pytest.approx(5 / 24)  # type: ignore[arg-type]
