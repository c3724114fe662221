"""What is timed: the embedded VLM, its language model alone, and requests to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.guards import Model, guarded_model
from vlm_safeguard.data import drawings, prompts
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.model.chat import encode, process, render
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.text_only import find_markup


@dataclass(frozen=True)
class Subjects:
    """A VLM and its language model, which share their weights."""

    loaded: LoadedModel
    vlm: Model
    llm: Model

    def inputs(self, batch: int, picture: bool) -> dict[str, torch.Tensor]:
        """A batch of questions, each with a blank picture or none."""
        texts = [pair.harmless for pair in prompts.anchors()[:batch]]
        image = drawings.blank() if picture else None
        return encode(self.loaded, texts, [image] * batch)

    def long_inputs(self, questions: int, images: int) -> dict[str, torch.Tensor]:
        """One request of several questions, with several blank pictures."""
        text = " ".join(pair.harmless for pair in prompts.anchors()[:questions])
        rendered = render(self.loaded.processor, text, images)
        return process(self.loaded.processor, [rendered], [[drawings.blank()] * images])


def embedded(dtype: str = "float32") -> Subjects:
    """The embedded VLM, assembled first if need be."""
    return subjects(load(assemble(), dtype=dtype))


def subjects(loaded: LoadedModel) -> Subjects:
    """A VLM, and its language model alone."""
    markup = find_markup(loaded)
    vlm = guarded_model(loaded.model, markup)
    return Subjects(loaded, vlm, guarded_model(_language_model(loaded.model), markup))


def _language_model(vlm: Any) -> PreTrainedModel:
    """The VLM's language model as a model of its own, around the same modules."""
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(vlm.config.get_text_config(decoder=True))
    alone.model, alone.lm_head = find_decoder(vlm).module, vlm.get_output_embeddings()
    alone.generation_config = vlm.generation_config
    return alone.eval()


def several_questions(number: int, count: int) -> str:
    """So many harmless questions in one text, from anchor ``number`` on."""
    pairs = prompts.anchors()
    return " ".join(pairs[(number + n) % len(pairs)].harmless for n in range(count))
