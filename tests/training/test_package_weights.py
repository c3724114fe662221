"""What was trained becomes part of the package, and of a checkpoint that others load."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    Qwen2ForCausalLM,
)

from tests import tiny
from training import package_weights, projector
from vlm_safeguard.embedded.assemble import MODELS, EmbeddedModel, write_checkpoint
from vlm_safeguard.embedded.base_llm import BaseLLM


class Resources(EmbeddedModel):
    """An embedded model whose files are in a folder of the test."""

    def resource(self, name: str) -> Path:
        return Path(self.resources) / name


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
    projector.save(own, out / "projector" / projector.FILE)
    resources.mkdir()
    template = MODELS["embedded"].resource("chat_template.jinja").read_text("utf-8")
    (resources / "chat_template.jinja").write_text(template)
    base = BaseLLM("tiny", "tiny.gguf", 0, "", (), None, "<pad>", ("</s>",))
    model = Resources("tiny", base, str(resources), "<image>", 0)
    monkeypatch.setattr(package_weights, "MODEL", model)
    monkeypatch.setattr(sys, "argv", ["package_weights", "--out", str(out)])
    return Trained(out, model, tower, own)


def test_weights_over_the_limit_are_refused(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_weights.main()
    files = {path: path.read_bytes() for path in trained.model.resource("").iterdir()}
    size = len(files[trained.model.resource("weights.safetensors")])
    monkeypatch.setattr(package_weights, "LIMIT", size)
    package_weights.main()
    monkeypatch.setattr(package_weights, "LIMIT", size - 1)
    with pytest.raises(SystemExit, match=rf"take {size} bytes, {size - 1} at most"):
        package_weights.main()
    assert {path: path.read_bytes() for path in trained.model.resource("").iterdir()} == files


def test_weights_are_packed_in_half_precision(trained: Trained) -> None:
    package_weights.main()
    tensors = load_file(trained.model.resource("weights.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {name.split("/")[0] for name in tensors} == {"projector", "tower"}
    vision = json.loads(trained.model.resource("vision_config.json").read_text())
    assert vision["patch_size"] == 12 and set(vision) <= set(package_weights.VISION)


def test_the_assembled_model_sees_what_was_trained(
    trained: Trained, llm: Qwen2ForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    package_weights.main()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tensors = load_file(trained.model.resource("weights.safetensors"))
    write_checkpoint(folder, trained.model, llm.config, llm.state_dict(), tokenizer, tensors)
    loaded = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = trained.projector(trained.tower(pixel_values=pixels).last_hidden_state[:, 1:])
        seen = loaded.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.cat(list(seen)).view_as(expected), expected)
    assert same_weights(loaded.model.language_model, llm.model)


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
