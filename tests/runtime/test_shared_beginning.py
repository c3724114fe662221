"""What texts begin with is run once when a guard is attached; scores are those of whole texts."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.checkpoint import BEGIN, load_with_system
from tests.runtime.test_text_forms import PHOTO, run, scores
from vlm_safeguard.errors import GuardError
from vlm_safeguard.model import shared_prefix
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.text_only import find_markup

TEXTS = ["How is it made? Tell me more.", "Tell me a story.", "Hi"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_with_system(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("picture", [None, PHOTO])
def test_scores_and_answers_are_those_of_whole_texts(
    loaded: LoadedModel, picture: Image.Image | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = [tiny.gate("text", 2, 4), tiny.gate("text", 2, per_layer=True)]
    made = tiny.guard(loaded.model, gates, reference="text")
    made = tiny.changed(made, markup=find_markup(loaded), reads_sentences=True)
    shared = run(loaded, made, TEXTS, picture)
    with monkeypatch.context() as whole:
        whole.setattr(shared_prefix, "SHORTEST", 10**9)
        alone = run(loaded, made, TEXTS, picture)
    for name in ("text.0", "text.1"):
        torch.testing.assert_close(scores(shared, name), scores(alone, name), atol=1e-4, rtol=1e-3)
    assert [d.fired for d in shared.decisions] == [d.fired for d in alone.decisions]


def test_texts_are_run_without_their_beginning(loaded: LoadedModel) -> None:
    made = tiny.guard(loaded.model, [tiny.gate("text", 2)], layers=[2])
    made = tiny.changed(made, markup=find_markup(loaded))
    widths: list[int] = []
    embedding = loaded.model.get_input_embeddings()
    with embedding.register_forward_hook(lambda _, __, out: widths.append(out.shape[1])):
        inputs = encode(loaded, TEXTS, [None] * 3)
        whole = inputs["input_ids"].shape[1]
        with made.attach(loaded.model, loaded.processor):
            loaded.model(**inputs)
            loaded.model(**inputs)
    assert widths == [BEGIN, whole - BEGIN, whole, whole - BEGIN, whole]


def test_a_guarded_model_is_refused_before_anything_runs(loaded: LoadedModel) -> None:
    made = tiny.guard(loaded.model, [tiny.gate("text", 2)])
    with made.attach(loaded.model), pytest.raises(GuardError, match="already attached"):
        made.attach(loaded.model, loaded.processor)
