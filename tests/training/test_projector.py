"""The projector: what it learns, that it alone learns, and that a stopped run can be resumed."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tests import tiny
from training import pictures, projector
from training.projector import Bank, Example, NameLoss, PictureLoss, Projector
from training.vision_tower import normalise
from vlm_safeguard.embedded.assemble import EmbeddedModel

STEPS = 4


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projector, "NAME_STEPS", 3)
    monkeypatch.setattr(projector, "NAMED", 8)
    monkeypatch.setattr(projector, "CHECKPOINT_EVERY", 2)


def made(bank: Bank) -> Projector:
    torch.manual_seed(0)
    return Projector(bank.features.shape[2], torch.randn(len(bank.named()), tiny.WIDTH))


def pools() -> dict[str, list[Example]]:
    """Examples of random tokens and of different lengths."""
    found = {}
    for number, (kind, count) in enumerate(projector.STEP.items()):
        found[kind] = [
            Example(tiny.words(n, 3 + n % 4), tiny.words(50 + n, 1 + n % 3), n % 20, kind)
            for n in range(number, number + 2 * count)
        ]
    return found


def train(
    bank: Bank, llm: Qwen2ForCausalLM, tokenizer: Any, steps: int, out: Path, expected: str = "same"
) -> Projector:
    """As ``projector.main`` does, from the start or from what lies in ``out``."""
    model = made(bank)
    loss_of = PictureLoss(llm, model, bank, tokenizer)
    data = projector.batches(pools(), seed=0)
    projector.tune(model, loss_of, NameLoss(bank), data, steps, out, expected)
    return model


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# -- training ------------------------------------------------------------------------------------


def test_only_the_projector_is_trained(
    bank: Bank, llm: Qwen2ForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    before, begun = state(llm), state(made(bank))
    after = state(train(bank, llm, tokenizer, STEPS, tmp_path))
    assert same(state(llm), before)
    assert all(parameter.grad is None for parameter in llm.parameters())
    assert not any(torch.equal(after[name], begun[name]) for name in begun)


def test_a_run_in_two_parts_is_the_same_as_in_one(
    bank: Bank, llm: Qwen2ForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    unbroken = state(train(bank, llm, tokenizer, STEPS, tmp_path / "one"))
    half = state(train(bank, llm, tokenizer, STEPS // 2, tmp_path / "two"))
    assert not same(half, unbroken)
    assert same(state(train(bank, llm, tokenizer, STEPS, tmp_path / "two")), unbroken)
    kept = sorted(path.name for path in (tmp_path / "two").glob("step-*"))
    assert kept == ["step-2", "step-4"]
    for name in kept:
        one, two = (
            load_file(tmp_path / run / name / projector.PROJECTOR) for run in ("one", "two")
        )
        assert same(one, two)


def test_a_finished_run_is_not_trained_further(
    bank: Bank, llm: Qwen2ForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    finished = state(train(bank, llm, tokenizer, 2, tmp_path))
    assert same(state(train(bank, llm, tokenizer, 2, tmp_path)), finished)
    with pytest.raises(SystemExit, match=r"is at step 2 already: .* delete it"):
        train(bank, llm, tokenizer, 1, tmp_path)


def test_a_run_of_other_settings_or_data_is_not_gone_on_with(
    bank: Bank, llm: Qwen2ForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    train(bank, llm, tokenizer, 2, tmp_path)
    path = tmp_path / projector.STATE
    written = path.read_bytes()
    with pytest.raises(SystemExit, match=rf"{path} was made with other .*: delete it"):
        train(bank, llm, tokenizer, STEPS, tmp_path, expected="other")
    assert path.read_bytes() == written
    path.unlink()
    train(bank, llm, tokenizer, 2, tmp_path, expected="other")


def test_what_a_run_is_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, tower = tmp_path / projector.ANSWERS, tmp_path / projector.TOWER
    monkeypatch.setattr(EmbeddedModel, "resource", lambda _, name: tmp_path / name)
    args = Namespace(out=tmp_path, model="embedded", dtype="float32")
    concepts = pictures.load_concepts()

    def write() -> None:
        answers.write_bytes(b"answers")
        tower.write_bytes(b"tower")

    write()
    digest = projector.made_from(args)
    assert digest == projector.made_from(args)
    found = {digest}
    for given in ({"model": "embedded-1.5b"}, {"dtype": "bfloat16"}):
        found.add(projector.made_from(Namespace(**vars(args) | given)))
    for path in (answers, tower):
        path.write_bytes(b"changed")
        found.add(projector.made_from(args))
        write()
    for name, value in (("CYCLE", 81), ("STEP", {"vqa": 1}), ("NAMING", ()), ("SCALE", 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(projector, name, value)
            found.add(projector.made_from(args))
    monkeypatch.setattr(pictures, "load_concepts", lambda: concepts[1:])
    found.add(projector.made_from(args))
    assert len(found) == 10


def test_the_stage_refuses_to_go_on_after_other_answers(
    bank: Bank,
    llm: Qwen2ForCausalLM,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "embedded-float32"
    folder.mkdir()
    answers = folder / projector.ANSWERS
    answers.write_text("one")
    monkeypatch.setattr(sys, "argv", ["projector", "--out", str(tmp_path), "--steps", "2"])
    monkeypatch.setattr(projector, "base_model", lambda _: (llm, tokenizer))
    monkeypatch.setattr(projector, "build_bank", lambda tower, cache: bank)
    monkeypatch.setattr(projector, "examples", lambda *_: pools())
    projector.main()
    trained = (folder / "projector" / projector.PROJECTOR).read_bytes()
    projector.main()
    assert (folder / "projector" / projector.PROJECTOR).read_bytes() == trained
    answers.write_text("other")
    with pytest.raises(SystemExit, match="other settings or data: delete it"):
        projector.main()


# -- losses --------------------------------------------------------------------------------------


def alone(
    llm: Qwen2ForCausalLM, model: Projector, bank: Bank, tokenizer: Any, example: Example
) -> Tensor:
    """The loss of one example, by one pass over the whole prompt."""
    embed = llm.get_input_embeddings()
    begin = tokenizer(projector.PREFIX).input_ids
    seen = model(bank.features[example.picture])
    tail = example.question + example.answer
    embeds = torch.cat([embed(torch.tensor(begin)), seen, embed(torch.tensor(tail))])
    logits = llm(inputs_embeds=embeds[None]).logits[0, -len(example.answer) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(example.answer))


def test_the_loss_is_that_of_each_example_by_itself(
    bank: Bank, llm: Qwen2ForCausalLM, tokenizer: Any
) -> None:
    model = made(bank)
    batch = next(projector.batches(pools(), seed=0))
    loss = PictureLoss(llm, model, bank, tokenizer)(batch)
    kinds: dict[str, list[Tensor]] = {kind: [] for kind in projector.STEP}
    for example in batch:
        kinds[example.kind].append(alone(llm, model, bank, tokenizer, example))
    expected = torch.stack([torch.stack(losses).mean() for losses in kinds.values()]).mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, list(model.parameters())) for each in (loss, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_hidden_units_learn_to_name_what_is_shown(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "NAME_STEPS", 150)
    model, name_loss = made(bank), NameLoss(bank)
    second = state(model.linear_2)
    assert "" not in name_loss.names
    projector.learn_names(model, name_loss)
    assert name_loss(model, 0)[1] == 1
    assert same(state(model.linear_2), second)


def test_the_pictures_to_name_are_those_of_the_step(bank: Bank) -> None:
    model, name_loss = made(bank), NameLoss(bank)
    first, second = name_loss(model, 1)[0], name_loss(model, 2)[0]
    assert torch.equal(name_loss(model, 1)[0], first) and not torch.equal(first, second)


# -- the projector itself ------------------------------------------------------------------------


def test_a_units_name_is_as_long_as_a_word_and_points_to_it() -> None:
    names = 3 * torch.randn(5, tiny.WIDTH)
    model = Projector(16, names)
    shown = projector.SCALE * model.linear_2.weight[:, :5].T
    torch.testing.assert_close(shown, projector.WORD_LENGTH * F.normalize(names, dim=1))


def test_what_is_saved_is_llavas_projector(bank: Bank, tmp_path: Path) -> None:
    model = made(bank)
    torch.nn.init.normal_(model.linear_2.bias)
    projector.save(model, tmp_path / "projector" / projector.PROJECTOR)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny.VISION),
        text_config=Qwen2Config(**tiny.TEXT),
        vision_feature_layer=-1,
    )
    plain = LlavaMultiModalProjector(config)
    plain.load_state_dict(load_file(tmp_path / "projector" / projector.PROJECTOR))
    assert torch.equal(plain(bank.features), model(bank.features))  # the scale is a power of two


def test_the_bank_holds_what_the_tower_sees_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    settings = tiny.VISION | {"image_size": pictures.SIDE, "patch_size": 48}
    tower = CLIPVisionModel(CLIPVisionConfig(**settings)).eval()
    side = pictures.SIDE
    circle, red = pictures.SHAPES.index("circle"), pictures.COLOURS.index("red")
    shapes = pictures.ShapeSet(
        torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8),
        torch.tensor([circle, circle]),
        torch.tensor([red, pictures.IGNORE]),
    )
    artists = [n for n, artist in enumerate(pictures.ARTISTS) if not artist.held_out]
    held_out = next(n for n, artist in enumerate(pictures.ARTISTS) if artist.held_out)
    emoji = pictures.EmojiSet(
        torch.randint(0, 256, (3, 4, side, side), dtype=torch.uint8),
        torch.tensor([4, 5, 6]),
        torch.tensor([artists[0], held_out, artists[1]]),
    )
    monkeypatch.setattr(pictures, "load_shapes", lambda: (shapes, shapes))
    monkeypatch.setattr(pictures, "load_emoji", lambda concepts, cache: emoji)
    monkeypatch.setattr(projector, "EMOJI_VARIANTS", 2)
    bank = projector.build_bank(tower, tmp_path)
    concepts = pictures.load_concepts()
    assert [bank.name[place] for place in bank.shapes] == ["red circle", ""]
    shown = [concepts[4].name, concepts[6].name] * 2  # nothing of the held-out artist
    assert [bank.name[place] for place in bank.emoji] == shown
    assert {bank.name[place] for place in bank.blank} == {"blank"}
    assert len(bank.features) == len(bank.name) == bank.blank.stop
    with torch.no_grad():
        pixels = normalise(pictures.plain_shapes(shapes.rgb))
        seen = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(bank.features[:2], seen[:, 1:])
