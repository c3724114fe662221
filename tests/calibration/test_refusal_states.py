"""What is recorded behind the first tokens of a model's refusals."""

from __future__ import annotations

import pytest
import torch

from tests import checkpoint
from vlm_safeguard.calibration import refusal_states
from vlm_safeguard.calibration.refusal_states import FEWEST, TOKENS, record_refusals
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.residual_stream import find_decoder, hidden_of, watch_layer
from vlm_safeguard.utils.progress import Progress

QUIET = Progress(quiet=True)
ASKED = [Query(f"Number {n}{'!' * (n % 5)}", None) for n in range(FEWEST + 3)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(checkpoint.save(tmp_path_factory.mktemp("tiny")))


def states_behind(loaded: LoadedModel, text: str, tokens: int) -> torch.Tensor:
    """States (L, d) behind so many tokens of an answer, all read again without a cache."""
    decoder, seen = find_decoder(loaded.model), list[torch.Tensor]()
    ids = encode(loaded, [text], [None])["input_ids"]
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, loaded.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    handles = [
        watch_layer(decoder, layer, lambda output: seen.append(hidden_of(output)[0, -1].double()))
        for layer in range(len(decoder.layers))
    ]
    with torch.no_grad():
        loaded.model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def test_it_is_the_mean_state_behind_each_token_that_the_model_writes(loaded: LoadedModel) -> None:
    found = record_refusals(loaded, ASKED, QUIET, batch=4)
    assert found is not None
    for n in range(TOKENS):
        expected = [states_behind(loaded, one.text, n + 1) for one in ASKED]
        torch.testing.assert_close(
            found[n].double(), torch.stack(expected).mean(0), atol=1e-4, rtol=1e-3
        )
    assert not any(layer._forward_hooks for layer in find_decoder(loaded.model).layers)


def test_few_refusals_say_nothing_and_of_many_some_are_read(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record_refusals(loaded, ASKED[: FEWEST - 1], QUIET) is None
    monkeypatch.setattr(refusal_states, "MOST", FEWEST)
    again = [one for one in ASKED[:FEWEST] for _ in range(2)]
    some, every = (record_refusals(loaded, asked, QUIET) for asked in (again, ASKED[:FEWEST]))
    assert some is not None and every is not None
    torch.testing.assert_close(some, every, atol=1e-4, rtol=1e-3)
