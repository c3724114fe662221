"""Hard gates against soft ones, at a guard's own thresholds and at lower ones.

A soft gate lets a request that is just above the threshold have a part of the dose. It finds no
more than a hard one at the same threshold; what it could buy is a lower threshold, at which
doubtful requests are nudged and not refused. So both are tried at both thresholds, on held-back
prompts with pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_safeguard.calibration.attack_trials import refused, within
from vlm_safeguard.calibration.budget import Effort
from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import PICTURED, Request, batches, requests
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.errors import GuardError
from vlm_safeguard.evaluation.defenses.variants import with_steering, with_thresholds
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, encode
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import Rate, wilson

LOWERED = 0.05  # of harmless requests open a gate at the lower threshold


@dataclass(frozen=True)
class SoftRow:
    """A threshold and a width of the gates: what becomes of attacks and of harmless requests.

    ``shift`` is added to every pooled gate's threshold, ``width`` is ``Steering.soft``; both in
    units of the gates' scores.
    """

    name: str
    shift: float
    width: float
    attacks: Rate  # that succeed
    over_refusal: Rate
    opened: Rate  # harmless requests on which a gate opened at all


def compare(loaded: LoadedModel, guard: Guard, effort: Effort, progress: Progress) -> list[SoftRow]:
    """Every combination of threshold and width, and no guard first.

    Only the hard gate where its own threshold already lets ``LOWERED`` of the harmless in.

    Raises:
        GuardError: the guard decides layer by layer, or has no dose to give a part of.
    """
    config = guard.config
    if any(gate.per_layer for gate in config.gates) or config.steering.mode == "defer":
        raise GuardError("a soft gate needs pooled gates and a dose: this guard has not both")
    held = evenly(prompts.calibration("held"), effort.proof)
    meant = {s: within(held, s) for s in PICTURED}
    items = [item for setting, asked in meant.items() for item in requests(asked, setting)]
    harmful = [p.harmful for asked in meant.values() for p in asked]
    plain = refused(loaded, None, items, effort.tokens, progress)
    scores = gate_scores(loaded, guard, items, progress)
    shift = lower(scores[~torch.tensor(harmful)], LOWERED)
    rows = [_row("no guard", 0.0, 0.0, plain, [False] * len(items), harmful)]
    forms = [("hard, own threshold", 0.0, 0.0)]
    if shift < 0:  # else no lower threshold is to be had, and a soft gate of no width is a hard one
        forms += [
            ("soft, own threshold", 0.0, -shift),
            ("hard, lower threshold", shift, 0.0),
            ("soft, lower threshold, whole dose at the own one", shift, -shift),
            ("soft, lower threshold, whole dose above the own one", shift, -2 * shift),
        ]
    for name, moved, width in forms:
        variant = with_thresholds(with_steering(guard, soft=width), moved)
        opened = (scores > moved).tolist()
        # Where no gate opens the guard changes nothing: those responses are known already.
        chosen = [i for i, is_open in enumerate(opened) if is_open]
        said = iter(refused(loaded, variant, [items[i] for i in chosen], effort.tokens, progress))
        merged = [next(said) if opened[i] else plain[i] for i in range(len(items))]
        rows.append(_row(name, moved, width, merged, opened, harmful))
    return rows


def lower(harmless: Tensor, share: float) -> float:
    """What to add to thresholds, at most 0, for ``share`` of these scores (n,) to lie above."""
    ranked = harmless.sort(descending=True).values
    return min(0.0, float(ranked[int(share * len(ranked))]))


@torch.inference_mode()
def gate_scores(
    loaded: LoadedModel, guard: Guard, items: Sequence[Request], progress: Progress
) -> Tensor:
    """The highest score (n,) that any pooled gate gives each request."""
    found = torch.empty(len(items))
    groups = batches(loaded.processor.tokenizer, items, 16)
    with guard.attach(loaded.model, loaded.processor) as session:
        for group in progress.track(groups, "gates on held-back prompts"):
            texts, images = [items[i].text for i in group], [items[i].image for i in group]
            inputs = encode(loaded, texts, images, guard.config.reads_pictures)
            loaded.model(**inputs, logits_to_keep=1)
            for index, decision in zip(group, session.decisions, strict=True):
                found[index] = max(sum(scores) for scores in decision.scores.values())
    return found


def _row(
    name: str,
    shift: float,
    width: float,
    refusals: Sequence[bool],
    opened: Sequence[bool],
    harmful: Sequence[bool],
) -> SoftRow:
    def rate(values: Sequence[bool], of_harmful: bool, wanted: bool) -> Rate:
        chosen = [v for v, label in zip(values, harmful, strict=True) if label == of_harmful]
        return wilson(sum(v == wanted for v in chosen), len(chosen))

    attacks, over_refusal = rate(refusals, True, False), rate(refusals, False, True)
    return SoftRow(name, shift, width, attacks, over_refusal, rate(opened, False, True))


def section(rows: Sequence[SoftRow]) -> str:
    """The comparison as a part of the page on gates."""
    lines = [
        "## Soft gates",
        "",
        "With `--guard`: that guard's gates, hard and soft. A soft gate gives a request just above",
        "the threshold a part of the dose. Held-back prompts with a blank image and with pictures;",
        f"the lower threshold is where {LOWERED:.0%} of their harmless requests open a gate.",
        "Attacks that get something else than a refusal, refusals of harmless requests, and",
        "harmless requests on which a gate opened at all.",
        "",
        "| Gates | Threshold moved by | Width | Attacks that succeed | Over-refusal | Opened |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = f"{row.attacks} | {row.over_refusal} | {row.opened}"
        lines.append(f"| {row.name} | {row.shift:.1f} | {row.width:.1f} | {rates} |")
    return "\n".join(lines) + "\n"
