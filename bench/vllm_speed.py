"""`python -m bench.vllm_speed`: tokens a second in vLLM, guarded / unguarded.

Runs in the environment of `make test-vllm`. Two engines, each in a process of its own, answer the
same requests in lockstep, step by step: one under a guard, the other without, and then the other
way round. `make bench-vllm` also measures vllm-lens, a library that adds vectors in vLLM, under the
same load.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from bench.subjects import several_questions
from bench.timing import Spread, as_json, spread, weighted_spread
from bench.vllm_engine import Answers, Engine, Variant, in_lockstep, running
from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.data import prompts
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.engines.vllm.requirements import SUPPORTED
from vlm_safeguard.evaluation.defenses.variants import changed
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.chat import render
from vlm_safeguard.utils.files import write_whole
from vlm_safeguard.utils.markdown import table

QUESTIONS, PICTURE = 4, 16  # in a prompt: about 50 tokens of text, and those of a picture
CANDIDATES = 8  # harmful anchors, those that the guard's self-check asks
FAR = 1e4  # no score comes near it, and one that it is added to keeps two digits behind the point
MODES = ("eager", "compiled")

Scores = list[list[float]]  # of requests, by layer

HEAD = """\
# What the guard costs in vLLM

`{command}`, in the environment of `make bench-vllm`,
wrote this page and [bench-vllm.json](assets/bench-vllm.json): vLLM {version} on a CPU with
{threads} threads, the embedded model in float32.

- Figures are tokens a second over those without a guard, so 0.99 costs one percent. Two processes
  answer the same requests in lockstep, step by step, one under the guard and one without; then they
  change roles, because processes that do the same work differ by several percent. The figure is the
  geometric mean of both. There are {rounds} such pairs of rounds of the largest batch, {fewer} of
  the others.
- Figures are the median, with quartiles, over all steps, each weighted by the time it takes; where
  the guard makes requests of its own, and so other steps, over the pairs of rounds. *Unguarded
  twice* compares two processes without a guard in the same way: the noise.
- vllm-lens, and *compiled* beside eager, cannot change roles: there the difference of processes
  counts too. In a compiled model the guard's operator stays, and does nothing, without the guard.
- Requests come all at once: harmless questions with a blank picture, {shortest} to {longest}
  tokens, {picture} of them the picture's. Every answer has {tokens} tokens. The time is that of
  `LLM.generate`, with the reading of the prompts. The prefix cache is off for all, because rounds
  repeat their prompts. All pictures are the same one, which vLLM encodes once.
- Guards are made from the one that ships, on 1, half or all of its layers. Their gate is the
  paper's: it reads the first safety direction in the request's own pass, so no text-only request is
  made. Its threshold keeps it shut or open. If it is open, the first token is steered, or every
  token. At the prompt, steering begins at the last layer that the gate reads, because it is not
  decided below.
- *As it ships* makes text-only requests: each prompt as text, and each of its {questions} sentences
  by itself. No guard here reads words in pictures, which costs what OCR costs."""

PEERS = """\
## Other libraries

hotwire-vllm 0.1.2 is not in the tables: it hooks `GPUModelRunner.load_model`, which vLLM's runner
for CPUs overrides, so it steers nothing there and does not say so; and its operator is a Triton
kernel, which needs a GPU.

vllm-lens 1.3.0 asks for Python 3.12 and vLLM 0.30.0, and also runs with this version. It has no
gate: it adds a vector after each of its layers, at every token. It turns compilation off, so it is
measured eagerly only."""


@dataclass(frozen=True)
class Load:
    """What engines are asked.

    Attributes:
        model: the model's folder.
        questions: prompts with a picture, as many as the largest batch.
        harmful: the questions of the guard's self-check, which are text.
        batches: how many requests come at once.
        tokens: of each answer.
        rounds: pairs of rounds with the largest batch; smaller ones get twice as many.
    """

    model: Path
    questions: list[str]
    harmful: list[str]
    batches: list[int]
    tokens: int
    rounds: int


@dataclass
class Found:
    """Measurements in one mode of vLLM.

    Attributes:
        prompts: tokens of each prompt.
        plain: by batch, tokens a second of the unguarded engine, in all rounds.
        rows: by variant and batch, its tokens a second over the unguarded engine's.
        opened: by variant under a guard, how many prompts of the largest batch opened a gate.
    """

    prompts: list[int] = field(default_factory=list)
    plain: dict[int, list[float]] = field(default_factory=dict)
    rows: dict[str, dict[int, Spread]] = field(default_factory=dict)
    opened: dict[str, int] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm_speed", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    parser.add_argument("--modes", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of variants' names")
    parser.add_argument("--peers", type=Path, help="folder where vllm-lens is installed")
    given = parser.parse_args()
    load = make_load(given.batches, given.tokens, given.rounds)
    (given.output / "assets").mkdir(parents=True, exist_ok=True)
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        variants = [
            variant
            for variant in make_variants(load, Path(folder), given.peers)
            if variant.name.startswith(tuple(given.only))
        ]
        for name in given.only:
            if not any(variant.name.startswith(name) for variant in variants):
                parser.error(f"no variant begins with {name!r}")
        for mode in given.modes:
            found[mode] = measure(load, variants, mode == "compiled")
            facts = json.dumps(
                as_json({name: _facts(one) for name, one in found.items()}), indent=1
            )
            files = {"assets/bench-vllm.json": facts + "\n", "bench-vllm.md": page(found, load)}
            write_whole({given.output / name: text.encode() for name, text in files.items()})
    print(given.output / "bench-vllm.md")


def make_load(batches: Sequence[int], tokens: int, rounds: int) -> Load:
    """Harmless questions, several in a prompt."""
    model, pairs = assemble(), prompts.anchors()
    processor = AutoProcessor.from_pretrained(model)
    questions = [several_questions(number, QUESTIONS) for number in range(max(batches))]
    return Load(
        model,
        [render(processor, text, 1) for text in questions],
        [render(processor, pair.harmful) for pair in pairs[:CANDIDATES]],
        sorted(batches),
        tokens,
        rounds,
    )


# -- variants --------------------------------------------------------------------------------------


def make_variants(load: Load, folder: Path, peers: Path | None) -> Iterator[Variant]:
    """What is measured beside the unguarded engine. Guards are saved in ``folder``."""

    def guarded(name: str, guard: Guard) -> Variant:
        path = Path(tempfile.mkdtemp(dir=folder))
        guard.save_pretrained(path)
        return Variant(name, guard=path)

    shipped = Guard.from_pretrained("embedded")
    sets = layer_sets(shipped.config.model.layers)
    yield Variant("unguarded twice")
    yield Variant("unguarded, compiled", compiled=True)
    scores = read_scores(load, guarded("to read scores", on_layers(shipped, sets["all"], -FAR)))
    for name, layers in sets.items():
        shut = shut_threshold(scores, gate_places(shipped, layers))
        yield guarded(f"{name}, shut", on_layers(shipped, layers, shut))
        yield guarded(f"{name}, open, every token", on_layers(shipped, layers, -FAR, tokens=None))
    yield guarded("all, open, first token", on_layers(shipped, sets["all"], -FAR))
    # Reading the words in pictures costs what OCR costs.
    shipped = changed(shipped, reads_pictures=False)
    unparted = changed(shipped, reads_sentences=False)
    yield guarded("without single sentences, else as it ships", unparted)
    yield guarded("as it ships", shipped)
    for name, layers in sets.items() if peers is not None else ():
        yield Variant(f"vllm-lens, {name}", lens=peers, layers=layers)


def layer_sets(depth: int) -> dict[str, list[int]]:
    """Layers guarded. The gates of the guard that ships read even ones."""
    return {"1": [depth // 2], "half": list(range(0, depth, 2)), "all": list(range(depth))}


def gate_places(shipped: Guard, layers: Sequence[int]) -> list[int]:
    """Which layers of the shipped guard's first gate are among ``layers``."""
    return [place for place, n in enumerate(shipped.config.gates[0].layers) if n in layers]


def on_layers(
    shipped: Guard, layers: Sequence[int], threshold: float, tokens: int | None = 1
) -> Guard:
    """The guard that ships, on some layers, with the paper's gate on those that its first gate
    reads, and steered towards the anchors.

    Nothing reads a request as text then, so no text-only request is made.
    """
    places = gate_places(shipped, layers)
    read = [shipped.config.gates[0].layers[place] for place in places]
    gate = Gate(
        source="vlm",
        layers=read,
        thresholds=[threshold] + [0.0] * (len(places) - 1),
    )
    steering = shipped.config.steering.model_copy(
        update={"layers": layers, "tokens": tokens, "reference": "anchor", "later": "same"}
    )
    vectors = torch.stack([shipped.tensors[f"directions.{layer}"][0] for layer in read])
    return changed(
        shipped,
        {"gate.0": vectors},
        gates=[gate],
        frame=None,
        steering=steering,
        reads_pictures=False,
        reads_sentences=False,
    )


def read_scores(load: Load, opened: Variant) -> tuple[Scores, Scores]:
    """What a gate scores, layer by layer, without its threshold: the questions, the harmful ones.

    ``opened``: an engine whose guard's gate is open by ``FAR``.
    """
    with running(opened, load.model) as engine:
        found = [
            *in_lockstep([engine], load.questions, 1),
            *in_lockstep([engine], load.harmful, 1, picture=False),
        ]
    questions, harmful = (
        [[first - FAR, *others] for first, *others in answers.scores] for answers in found
    )
    return questions, harmful


def shut_threshold(scores: tuple[Scores, Scores], places: Sequence[int]) -> float:
    """A threshold on some layers that keeps a gate shut on all questions, and that the self-check
    passes: it opens on one of the harmful ones.

    Raises:
        RuntimeError: no harmful question scores higher than all others.
    """
    questions, harmful = (
        max(sum(parts[place] for place in places) for parts in each) for each in scores
    )
    if harmful <= questions:
        raise RuntimeError("on these layers no threshold tells a harmful question from the others")
    return (questions + harmful) / 2


# -- measurements ----------------------------------------------------------------------------------


def measure(load: Load, variants: Sequence[Variant], compiled: bool) -> Found:
    """Every variant, in two processes that take its guard off in turn; or, where there is none to
    take off, beside an unguarded one."""
    found = Found()
    for variant in variants:
        # vllm-lens turns compilation off, and what is compiled anyway has been measured.
        if compiled and (variant.lens is not None or variant.compiled):
            continue
        alike = variant.lens is None and not variant.compiled
        other = variant if alike else Variant("unguarded")
        variant, other = (
            replace(one, compiled=compiled or one.compiled) for one in (variant, other)
        )
        with running(variant, load.model) as engine, running(other, load.model) as second:
            _compare(engine, second, variant, load, found, alike)
    return found


def _compare(
    engine: Engine, other: Engine, variant: Variant, load: Load, found: Found, alike: bool
) -> None:
    """Both engines in lockstep, after two rounds that do not count. If they are ``alike``, they
    change roles after each round.

    Raises:
        RuntimeError: vllm-lens changes no answer, so its time would mean nothing.
    """
    found.rows[variant.name] = {}
    for batch in load.batches:
        pairs: list[tuple[Answers, Answers]] = []
        rounds = 2 * load.rounds * (1 if batch == max(load.batches) else 2)
        for number in range(-2, rounds):
            bare = engine if alike and number % 2 else other
            # Two rounds in one order, then two in the other.
            order = [engine, other] if number // 2 % 2 else [other, engine]
            both = in_lockstep(order, load.questions[:batch], load.tokens, bare=bare)
            answers = dict(zip(order, both, strict=True))
            plain = answers.pop(bare)
            (guarded,) = answers.values()
            pairs += [(plain, guarded)] if number >= 0 else []
        if variant.lens is not None and guarded.tokens == plain.tokens:
            raise RuntimeError("vllm-lens does not steer")
        if variant.guard is not None:
            found.opened[variant.name] = guarded.opened
        found.prompts = plain.prompts
        rates = [batch * load.tokens / one.seconds for one, _ in pairs]
        found.plain.setdefault(batch, []).extend(rates)
        ratio = speed_ratio(pairs)
        found.rows[variant.name][batch] = ratio
        print(f"{variant.name}: {batch} at once: {ratio}", file=sys.stderr)


def speed_ratio(pairs: Sequence[tuple[Answers, Answers]]) -> Spread:
    """Speed under a guard over that without, from rounds (without, under) whose engines change
    roles: the geometric mean of two rounds that follow each other, in which the difference of two
    processes cancels out.

    Engines that take the same steps are compared step by step, each of which counts as long as it
    takes: a moment in which the machine is busy spoils one step, and not a round. An engine that
    makes requests of its own takes other steps, and whole rounds are compared.
    """
    by_turns = len({len(one.turns) for both in pairs for one in both}) == 1
    values, weights = [], []
    for pair in zip(pairs[::2], pairs[1::2], strict=True):
        turns = [(one.turns if by_turns else [one.seconds]) for both in pair for one in both]
        for plain, guarded, plain_again, guarded_again in zip(*turns, strict=True):
            values.append(math.sqrt(plain / guarded * plain_again / guarded_again))
            weights.append(plain + plain_again)
    return weighted_spread(values, weights) if by_turns else spread(values)


def _facts(found: Found) -> dict[str, Any]:
    return {
        "prompt_tokens": spread(found.prompts),
        "unguarded_tokens_per_s": {batch: spread(rates) for batch, rates in found.plain.items()},
        "ratios": found.rows,
        "opened": found.opened,
    }


def page(found: Mapping[str, Found], load: Load) -> str:
    """The measurements as Markdown."""
    widths = [tokens for one in found.values() for tokens in one.prompts]
    head = HEAD.format(
        command=f"python -m bench.vllm_speed --rounds {load.rounds} --tokens {load.tokens}",
        version=SUPPORTED[0],
        threads=torch.get_num_threads(),
        rounds=load.rounds,
        fewer=2 * load.rounds,
        shortest=min(widths),
        longest=max(widths),
        picture=PICTURE,
        tokens=load.tokens,
        questions=QUESTIONS,
    )
    tables = [f"## {mode.capitalize()}\n\n{_table(one, load)}" for mode, one in found.items()]
    return "\n\n".join([head, *tables, PEERS]) + "\n"


def _table(found: Found, load: Load) -> str:
    head = ["", "gate opens on", *(f"{batch} at once" for batch in load.batches)]
    speed = [str(spread(found.plain[batch])) for batch in load.batches]
    rows = [["unguarded, tokens/s", "", *speed]]
    for name, by_batch in found.rows.items():
        opened = f"{found.opened[name]} of {max(load.batches)}" if name in found.opened else ""
        rows.append([name, opened, *map(str, by_batch.values())])
    return table(head, rows)


if __name__ == "__main__":
    main()
