"""The model's own answers to harmless prompts, before any training.

Alignment and visual tuning both use them as targets, so that neither teaches new content: what
changes is only what is refused and that pictures can be seen. No harmful prompt is ever answered.

    python -m training.self_answers --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.common import (
    PROMPT,
    base_model,
    fast_dtype,
    first_sentences,
    log,
    read_all,
    read_jsonl,
    write_jsonl,
)

SHORT = " Answer in one or two short sentences."


@torch.inference_mode()
def answer(model, tokenizer, prompts: list[str], batch: int = 64) -> list[str]:
    """Greedy answers with a mild repetition penalty, cut to whole sentences."""
    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        texts = [PROMPT.format(prompts[i] + SHORT) for i in chosen]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=44, do_sample=False, repetition_penalty=1.1)
        for i, row in zip(chosen, out[:, inputs.input_ids.shape[1] :], strict=True):
            answers[i] = first_sentences(tokenizer.decode(row, skip_special_tokens=True))
        log(f"answers {start + len(chosen)}/{len(prompts)}")
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    target = args.out / "self_answers.jsonl"
    rows = read_all("align_harmless") + read_all("followup_harmless")
    known = {r["prompt"]: r for r in read_jsonl(target)} if target.exists() else {}
    todo = [r for r in rows if r["prompt"] not in known]
    torch.set_num_threads(2)
    if todo:
        model, tokenizer = base_model(args.cache)
        answers = answer(model.to(fast_dtype()), tokenizer, [r["prompt"] for r in todo])
        known |= {r["prompt"]: r | {"answer": a} for r, a in zip(todo, answers, strict=True)}
    # An answer of a word or two teaches nothing about answering.
    kept = [known[r["prompt"]] for r in rows if len(known[r["prompt"]]["answer"].split()) >= 3]
    write_jsonl(target, kept)
    log(f"{len(kept)} answers to {len(rows)} prompts")


if __name__ == "__main__":
    main()
