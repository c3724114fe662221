"""A harm that a tiny random model knows: its states tell which requests hold a mark.

Random weights tell no harm from harmlessness. These do, from the weights of one head alone, so that
recording, gates and guards work on such a checkpoint as on a model that was aligned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlm_safeguard.data.prompts import CalibrationData, Prompt
from vlm_safeguard.model.residual_stream import find_decoder

MARK = "~"
# Coordinates of the residual stream: which token is the mark; the same for all; what is told.
IS_MARK, CONSTANT, TOLD = 0, 1, 2
SIZE = 60.0  # of what is told: beyond what random layers add


@torch.no_grad()
def plant(model: Any, token: int, opening: int, projector: nn.Linear) -> None:
    """Make every token after the mark tell of it in its state, from the first layer on.

    The first head of that layer attends to the mark, however far it is, and copies it.

    Args:
        model: a VLM with rotary positions and grouped queries. It is changed.
        token: the mark's.
        opening: the token that answers to marked requests begin with.
        projector: the last layer of what makes image tokens. None of these looks like the mark.
    """
    words = model.get_input_embeddings().weight
    words[token] = 0.0
    words[:, IS_MARK], words[:, CONSTANT] = 0.0, 1.0
    words[token, IS_MARK] = 8.0
    projector.weight[IS_MARK] = projector.bias[IS_MARK] = 0.0
    attention = find_decoder(model).layers[0].self_attn
    size, group = attention.head_dim, attention.num_key_value_groups
    attention.q_proj.weight[: group * size] = 0.0
    attention.k_proj.weight[:size] = attention.v_proj.weight[:size] = 0.0
    attention.o_proj.weight[:, : group * size] = 0.0
    slow = size // 2 - 1  # the pair of dimensions that positions turn least
    attention.q_proj.weight[slow, CONSTANT] = attention.k_proj.weight[slow, IS_MARK] = 4.0
    attention.v_proj.weight[0, IS_MARK] = 1.0
    attention.o_proj.weight[TOLD, 0] = SIZE / 8.0
    model.lm_head.weight[:, TOLD] = 0.0
    model.lm_head.weight[opening, TOLD] = 5.0


def marked(text: str) -> str:
    return f"{text} {MARK}"


def calibration_data() -> CalibrationData:
    """The package's, with the mark at the end of every harmful text and of no other."""
    data = CalibrationData.packaged()
    return replace(
        data,
        anchors=[replace(pair, harmful=marked(pair.harmful)) for pair in data.anchors],
        fit=[_told(prompt) for prompt in data.fit],
        held=[_told(prompt) for prompt in data.held],
    )


def _told(prompt: Prompt) -> Prompt:
    return replace(prompt, prompt=marked(prompt.prompt)) if prompt.harmful else prompt
