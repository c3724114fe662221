"""The LoRA that the language model is trained with, in every stage the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.common import Example, answer_loss, arithmetic, collate, frozen, log

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 32
FILE = "lora.safetensors"


def with_lora(model: nn.Module, start: Path | None = None) -> nn.Module:
    """The frozen model with a LoRA on every projection: a new one, or the one that ``save_lora``
    wrote to the folder ``start``."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, lora_dropout=0.0)
    tuned = get_peft_model(frozen(model), config)
    if start is not None:
        set_peft_model_state_dict(tuned, load_file(start / FILE))
    return tuned


def trainable(tuned: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are learned, by name."""
    return {name: p for name, p in tuned.named_parameters() if p.requires_grad}


def text_loss(tuned: nn.Module, tokenizer) -> Callable[[list[Example]], Tensor]:
    """The loss of a group of examples without pictures."""
    inner = tuned.base_model.model

    def loss_of(group: list[Example]) -> Tensor:
        batch = collate(group, tokenizer)
        with arithmetic():
            hidden = inner.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            return answer_loss(hidden, inner.lm_head, batch.labels)

    return loss_of


def save_lora(tuned: nn.Module, folder: Path) -> None:
    """Write the LoRA to ``folder``, whole or not at all."""
    tensors = {k: v.contiguous() for k, v in get_peft_model_state_dict(tuned).items()}
    temporary = folder / "lora.tmp"
    save_file(tensors, temporary)
    temporary.replace(folder / FILE)
    log(f"LoRA written to {folder}")
