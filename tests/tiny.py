"""Tiny random models, guards made by hand, and padded batches of token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlm_safeguard.artifact.config import (
    Gate,
    GuardConfig,
    ImageMarkup,
    ModelIdentity,
    Steering,
    TextFrame,
)
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.fingerprint import config_digest
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.weights import weights_digest

LAYERS, WIDTH, VOCAB = 6, 32, 260
PAD, EOS, NEWLINE, IMAGE = 0, 1, 3, 258
PATCHES = 4
NEW = 4  # tokens of an answer, where nothing else is said

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 12,
    "initializer_range": 0.3,
}


def llava(seed: int = 0, **text: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**(TEXT | text)),
        image_token_id=IMAGE,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    return ready(LlavaForConditionalGeneration(config))


def llama(**settings: Any) -> LlamaForCausalLM:
    """A language model by itself."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(TEXT | settings))).eval()


def onevision(seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        pad_token_id=PAD,
    )
    return ready(LlavaOnevisionForConditionalGeneration(config))


def ready(model: Any) -> Any:
    """Weights large enough that every part matters; generation never stops early."""
    for parameter in model.parameters():  # some parts ignore the initializer's range
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    # Never stop early, so that runs of different batches have the same length.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


# -- requests ----------------------------------------------------------------------------------


def pictured(text: Sequence[int], pictures: int = 1) -> list[int]:
    """Token ids of a request with pictures: image tokens and a newline each, then the text."""
    return [*([IMAGE] * PATCHES + [NEWLINE]) * pictures, *text]


def words(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 250, (count,), generator=generator).tolist()


# Ragged, with pictures and without.
PROMPTS = [
    pictured(words(0, 7)),
    words(1, 5),
    pictured(words(2, 3)),
    words(3, 9),
    [*words(4, 2), *pictured(words(5, 4), pictures=2)],
    pictured(words(6, 6)),
]
TEXTS = [words(seed, 4 + seed) for seed in range(5)]  # without pictures


def batch(prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    """Padded model inputs; each picture is drawn from the prompt it belongs to."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    pixels = []
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
        generator = torch.Generator().manual_seed(sum(prompt))
        count = list(prompt).count(IMAGE) // PATCHES
        pixels += [torch.randn(3, 24, 24, generator=generator) for _ in range(count)]
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"pixel_values": torch.stack(pixels)} if pixels else {})


def without_pictures(prompt: Sequence[int]) -> list[int]:
    """The text-only prompt, written down independently of the package."""
    kept, place = [], 0
    while place < len(prompt):
        if prompt[place] == IMAGE:
            place += PATCHES + 1  # its newline too
        else:
            kept.append(prompt[place])
            place += 1
    return kept


def generate(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Sequences without their prompts, and the logits of every step, (B, new, vocabulary)."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    steps = list(out.logits)
    if options.get("num_beams", 1) > 1:  # each token's come from the beam it was found on
        steps = [table[out.beam_indices[:, step]] for step, table in enumerate(steps)]
    return out.sequences[:, -len(steps) :], torch.stack(steps, 1)


# -- guards ------------------------------------------------------------------------------------


def gate(
    source: str,
    *layers: int,
    per_layer: bool = False,
    threshold: float = 0.0,
    reads_mean: bool = False,
    reads_probe: bool = False,
) -> Gate:
    return Gate(
        source=source,
        layers=layers,
        thresholds=[threshold] * len(layers),
        per_layer=per_layer,
        reads_mean=reads_mean or reads_probe,
        reads_probe=reads_probe,
    )


def guard(
    model: Any,
    gates: Sequence[Gate],
    seed: int = 0,
    name: str = "tiny",
    frame: TextFrame | None = None,
    **steering: Any,
) -> Guard:
    """A guard with random directions and gates; ``steering`` as in ``Steering``."""
    if frame is None and any(one.reads_mean for one in gates):
        probe = [11, 12, 13] if any(one.reads_probe for one in gates) else []
        frame = TextFrame(before=2, after=1, probe=probe)
    settings = {"mode": "restore", "layers": [2, 4], "rank": 3, "alpha": 0.5} | steering
    steer = Steering(**settings)
    generator = torch.Generator().manual_seed(seed)
    decoder = find_decoder(model)
    size = decoder.hidden_size
    tensors = {}
    for layer in steer.layers:
        square = torch.randn(size, size, generator=generator, dtype=torch.float64)
        rows = torch.linalg.qr(square)[0][: steer.rank]
        tensors[f"directions.{layer}"] = rows.float().contiguous()
        tensors[f"anchor.{layer}"] = 2 * torch.randn(steer.rank, generator=generator)
        if steer.later == "refusal":
            shape = (steer.tokens - 1, steer.rank)
            tensors[f"refusal.{layer}"] = 2 * torch.randn(shape, generator=generator)
    for index, one in enumerate(gates):
        vectors = torch.randn(len(one.layers), one.states_read * size, generator=generator)
        tensors[f"gate.{index}"] = vectors / vectors.norm(dim=1, keepdim=True)
    config = GuardConfig(
        model=ModelIdentity(
            name=name,
            config_sha256=config_digest(model),
            weights_sha256=weights_digest(model),
            template_sha256="",
            hidden_size=size,
            layers=len(decoder.layers),
        ),
        markup=ImageMarkup(token_ids=[IMAGE], after=[NEWLINE], pad_id=PAD),
        frame=frame,
        gates=list(gates),
        steering=steer,
    )
    return Guard(config, tensors)


def always(model: Any, threshold: float = -1e9, **steering: Any) -> Guard:
    """A guard that fires for every request, or with +1e9 for none."""
    return guard(model, [gate("text", 2, threshold=threshold)], **steering)


def changed(made: Guard, **settings: Any) -> Guard:
    """The same guard with other settings at the top level."""
    return Guard(made.config.model_copy(update=settings), made.tensors)


def with_thresholds(made: Guard, thresholds: Sequence[Sequence[float]]) -> Guard:
    """The same guard with other thresholds, one list per gate."""
    gates = [
        one.model_copy(update={"thresholds": list(values)})
        for one, values in zip(made.config.gates, thresholds, strict=True)
    ]
    return changed(made, gates=gates)
