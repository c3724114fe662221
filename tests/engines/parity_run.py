"""Compare vLLM under guard with transformers under guard, request by request, on the embedded VLM.

    python -m tests.engines.parity_run --count 60 -o parity/

For each set and setting (text, blank, picture) ``--count`` prompts, greedy, float32. Each side runs
in a process of its own. In vLLM requests arrive at random in mixed batches of about 64, then some
of them alone. Where tokens differ, the page shows how far the best two tokens of transformers were
apart there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import query, settings_of
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.model.chat import render_conversation
from vlm_safeguard.utils.progress import Progress

TIE = 1e-3  # of two logits
TOLERANCE = 1e-2  # of a gate score
SETS = ("malicious", "jailbreak", "picture")


def requests(count: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and conversation of each request, ``count`` for each set and setting."""
    for name in SETS:
        for prompt in evenly(prompts.evaluation(name), count):
            for setting in settings_of(prompt):
                asked = query(prompt, setting)
                pictures = [] if asked.image is None else [{"type": "image", "image": asked.image}]
                content = [*pictures, {"type": "text", "text": asked.text}]
                yield f"{prompt.id}/{setting}", [{"role": "user", "content": content}]


def in_transformers(name: str, count: int, tokens: int) -> dict[str, dict[str, Any]]:
    """Tokens, margins and decisions of the transformers path, one request after the other.

    ``name``: of the guard.
    """
    import torch

    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.loading import load

    loaded, guard = load(assemble(), dtype="float32", device="cpu"), Guard.from_pretrained(name)
    found = {}
    with guard.attach(loaded.model, loaded.processor) as session, torch.inference_mode():
        for request, conversation in Progress().track(list(requests(count)), "in transformers"):
            inputs = guard.prepare(loaded.processor, conversation)
            out = loaded.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            width = inputs["input_ids"].shape[1]
            best = [logits[0].topk(2).values for logits in out.logits]
            found[request] = {
                "prompt": width,
                "tokens": out.sequences[0, width:].tolist(),
                "margins": [float(first - second) for first, second in best],
                "scores": session.decisions[0].parts,
                "sources": list(session.decisions[0].sources),
            }
    return found


def in_vllm(guard: str, count: int, tokens: int, alone: int) -> dict[str, dict[str, Any]]:
    """The same of vLLM: requests that arrive at random, then ``alone`` of them one by one.

    Each says how many ran in the batch in which it ended, without those that the guard reads texts
    by.
    """
    os.environ |= {"VLM_SAFEGUARD": guard, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    from vlm_safeguard.engines.vllm.front_end import decisions

    folder = assemble()
    processor = AutoProcessor.from_pretrained(folder)
    # Each request takes a place, and so does each text that the guard reads for it.
    llm = LLM(model=str(folder), max_model_len=1024, max_num_seqs=256, max_num_batched_tokens=2048)
    engine, sampling = llm.llm_engine, SamplingParams(temperature=0.0, max_tokens=tokens)
    scheduler = engine.engine_core.engine_core.scheduler
    found: dict[str, dict[str, Any]] = {}
    progress = Progress()

    def step(suffix: str = "") -> None:
        outputs = engine.step()
        ended = sum(output.finished for output in outputs)
        batch = ended + sum("#text" not in request.request_id for request in scheduler.running)
        for output in outputs:
            if output.finished:
                if len(found) % 10 == 9:
                    progress.say(f"in vLLM: {len(found) + 1} requests")
                decision = decisions(output)[0]
                found[output.request_id + suffix] = {
                    "prompt": len(output.prompt_token_ids),
                    "tokens": list(output.outputs[0].token_ids),
                    "scores": decision.parts,
                    "sources": list(decision.sources),
                    "batch": batch,
                }

    def prompt(conversation: list[dict[str, Any]]) -> dict[str, Any]:
        pictures = [part["image"] for part in conversation[0]["content"] if part["type"] == "image"]
        text = render_conversation(processor, conversation)
        return {"prompt": text} | ({"multi_modal_data": {"image": pictures}} if pictures else {})

    waiting = list(requests(count))
    random.Random(0).shuffle(waiting)
    arrivals = random.Random(1)
    some = waiting[:alone]
    while waiting or engine.has_unfinished_requests():
        room = 128 - engine.get_num_unfinished_requests()
        for _ in range(min(len(waiting), room, arrivals.choice((0, 0, 4, 16, 64)))):
            name, conversation = waiting.pop()
            engine.add_request(name, prompt(conversation), sampling)
        step()
    for name, conversation in some:
        engine.add_request(name, prompt(conversation), sampling)
        while engine.has_unfinished_requests():
            step(" alone")
    return found


def compare(reference: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The page: counts, then each difference."""
    lines, ties, wrong, furthest = [], 0, 0, 0.0
    for name, own in sorted(other.items()):
        known = reference[name.removesuffix(" alone")]
        apart = max(
            _apart(a, b)
            for gate, scores in known["scores"].items()
            for a, b in zip(scores, own["scores"][gate], strict=True)
        )
        furthest = max(furthest, apart)
        faults = []
        if known["prompt"] != own["prompt"]:
            faults.append(f"prompt of {own['prompt']} tokens, not {known['prompt']}")
        if apart > TOLERANCE:
            faults.append(f"gate scores {apart:.2g} apart")
        if known["sources"] != own["sources"]:
            faults.append(f"gates {own['sources']}, not {known['sources']}")
        if known["tokens"] != own["tokens"]:
            place = _first_difference(known["tokens"], own["tokens"])
            margin = known["margins"][min(place, len(known["margins"]) - 1)]
            fault = f"token {place} differs, where the best two are {margin:.2g} apart"
            if margin < TIE and not faults:
                ties += 1
                lines.append(f"{name}: a tie: {fault}")
            else:
                faults.append(fault)
        wrong += bool(faults)
        lines += [f"{name}: {fault}" for fault in faults]
    lost = sorted(set(reference) - set(other))
    lines += [f"{name}: no answer in vLLM" for name in lost]
    wrong += len(lost)
    batches = [own["batch"] for name, own in other.items() if not name.endswith(" alone")]
    head = (
        f"{len(other)} requests: {wrong} differ, {ties} ties; gate scores at most {furthest:.2g} "
        f"apart; {len(other) - len(batches)} alone, the others in batches of "
        f"{min(batches)} to {max(batches)}, median {statistics.median(batches):.0f}"
    )
    return [head, *lines]


def _apart(left: float, right: float) -> float:
    """Distance of two scores; none if neither was read."""
    if math.isnan(left) or math.isnan(right):
        return 0.0 if math.isnan(left) and math.isnan(right) else math.inf
    return abs(left - right)


def _first_difference(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    short = min(len(left), len(right))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), short)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guard", default="embedded")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--alone", type=int, default=60)
    parser.add_argument("--side", choices=("transformers", "vllm"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    files = {side: given.output / f"{side}.json" for side in ("transformers", "vllm")}
    if given.side:
        found = (
            in_transformers(given.guard, given.count, given.tokens)
            if given.side == "transformers"
            else in_vllm(given.guard, given.count, given.tokens, given.alone)
        )
        files[given.side].write_text(json.dumps(found))
        return 0
    for side in files:
        command = [sys.executable, "-m", "tests.engines.parity_run", *sys.argv[1:], "--side", side]
        subprocess.run(command, check=True)
    page = compare(*(json.loads(path.read_text()) for path in files.values()))
    (given.output / "parity.txt").write_text("\n".join(page) + "\n")
    print("\n".join(page))
    return int(": 0 differ" not in page[0])


if __name__ == "__main__":
    sys.exit(main())
