"""What was trained becomes part of the package, and of a checkpoint that others load."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests import tiny
from training import package_weights, projector
from vlm_safeguard.embedded.assemble import (
    BESIDE,
    MODELS,
    PROJECTOR,
    TEMPLATE,
    TOWER,
    VISION,
    EmbeddedModel,
    write_checkpoint,
)
from vlm_safeguard.embedded.base_llm import BaseLLM, sha256_file


class Resources(EmbeddedModel):
    """An embedded model whose files are in a folder of the test."""

    def resource(self, name: str) -> Path:
        return Path(self.own) / name


@dataclasses.dataclass(frozen=True)
class Trained:
    out: Path
    model: Resources
    tower: CLIPVisionModel
    projector: projector.Projector


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The results of the stages before, with weights that are exact in half precision."""
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**tiny.VISION)).eval()
    own = projector.Projector(16, torch.randn(3, tiny.WIDTH))
    for module in (tower, own):
        module.half().float()
    out, resources = tmp_path / "out", tmp_path / "package"
    tower.save_pretrained(out / "vision_tower")
    projector.save(own, out / "embedded-float32" / "projector" / PROJECTOR)
    resources.mkdir()
    template = MODELS["embedded"].resource(TEMPLATE).read_text("utf-8")
    (resources / TEMPLATE).write_text(template)
    base = BaseLLM("tiny", "tiny.gguf", 0, "", (), None, "<pad>", ("</s>",))
    model = Resources("tiny", base, str(resources), 0, "<image>")
    monkeypatch.setattr(package_weights, "MODELS", {"embedded": model})
    return Trained(out, model, tower, own)


def package(trained: Trained, *parts: str) -> None:
    """Put ``parts`` into the package, by default all."""
    for part in parts or ("tower", "projector"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["package_weights", part, "--out", str(trained.out)])
            package_weights.main()


def test_weights_over_the_limit_are_refused(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(trained)
    files = {path: path.read_bytes() for path in trained.model.resource("").iterdir()}
    size = sum(len(files[trained.model.resource(name)]) for name in (TOWER, PROJECTOR))
    monkeypatch.setattr(package_weights, "LIMIT", size)
    package(trained)
    monkeypatch.setattr(package_weights, "LIMIT", size - 1)
    for part in ("tower", "projector"):
        with pytest.raises(SystemExit, match=rf"take {size} bytes, {size - 1} at most"):
            package(trained, part)
    assert {path: path.read_bytes() for path in trained.model.resource("").iterdir()} == files


def test_weights_are_packed_in_half_precision(trained: Trained) -> None:
    package(trained)
    for name in (TOWER, PROJECTOR):
        tensors = load_file(trained.model.resource(name))
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    vision = json.loads(trained.model.resource(VISION).read_text())
    assert vision["patch_size"] == 12 and set(vision) <= set(package_weights.FACTS)
    assert same_weights(package_weights.packaged_tower(trained.model), trained.tower)


def test_a_projector_names_its_tower(trained: Trained) -> None:
    package(trained)
    assert beside(trained.model) == sha256_file(trained.model.resource(TOWER))


def test_projectors_ship_with_the_tower_that_they_were_trained_beside() -> None:
    for model in MODELS.values():
        assert beside(model) == sha256_file(model.resource(TOWER)), model.name


def test_the_cards_name_the_weights_that_ship() -> None:
    for model in MODELS.values():
        card = model.resource("CARD.md").read_text("utf-8")
        for name in (PROJECTOR, TOWER):
            assert f"`{name}`, SHA-256 `{sha256_file(model.resource(name))}`" in card


def beside(model: EmbeddedModel) -> str:
    with safe_open(model.resource(PROJECTOR), "pt") as stored:
        return stored.metadata()[BESIDE]


def test_the_assembled_model_sees_what_was_trained(
    trained: Trained, llm: Qwen2ForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    package(trained)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    made = [load_file(trained.model.resource(name)) for name in (PROJECTOR, TOWER)]
    write_checkpoint(folder, trained.model, llm.config, llm.state_dict(), tokenizer, *made)
    loaded = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = trained.projector(trained.tower(pixel_values=pixels).last_hidden_state[:, 1:])
        seen = loaded.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.cat(list(seen)).view_as(expected), expected)
    assert same_weights(loaded.model.language_model, llm.model)


def test_a_base_whose_embeddings_are_tied_is_written_once(
    trained: Trained, tokenizer: Any, tmp_path: Path
) -> None:
    package(trained)
    llm = Qwen2ForCausalLM(Qwen2Config(**tiny.TEXT | {"tie_word_embeddings": True})).eval()
    made = [load_file(trained.model.resource(name)) for name in (PROJECTOR, TOWER)]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_checkpoint(folder, trained.model, llm.config, llm.state_dict(), tokenizer, *made)
    assert "language_model.lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = LlavaForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, llm.lm_head.weight)


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
