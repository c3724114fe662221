"""What the training scripts share: the language model, files and progress."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_safeguard.embedded.assemble import MODELS
from vlm_safeguard.embedded.base_llm import load_llm

HERE = Path(__file__).parent
DATA = HERE / "data"
SEED = 20250210
SYSTEM = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n"
)
END = "<|im_end|>"


def stage_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every stage: cache, out, model, dtype."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    add_model(parser)
    return parser


def stage(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What a stage is called with; seeds torch.

    ``out`` becomes the folder of the model and dtype in the one that is named.
    """
    args = parser.parse_args()
    args.out = folder_of(args)
    torch.manual_seed(SEED)
    return args


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the embedded VLM and the dtype of its language model."""
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the language model; bfloat16 is for processors that multiply it fast",
    )


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of the model and dtype in ``args.out``."""
    return Path(args.out) / f"{args.model}-{args.dtype}"


def log(message: str) -> None:
    """Progress goes to stderr; stdout stays free for data."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Log what a stage took when it is done."""
    began = time.monotonic()
    yield
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    log(f"{name} took {minutes} min {seconds} s")


def read_jsonl(path: Path) -> list[dict]:
    """Every line of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write all rows or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    temporary.replace(path)


def base_model(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The language model of the embedded VLM ``args.model``, frozen, and its tokenizer."""
    model, tokenizer = load_llm(MODELS[args.model].base, args.cache, log)
    for parameter in model.parameters():  # not the rotary embedding's buffers, as when it loads
        parameter.data = parameter.data.to(getattr(torch, args.dtype))
    return model.requires_grad_(False), tokenizer
