"""Calibrates a guard: directions, gates, steering, and a test on held-back prompts.

0. Check that the model's refusals of harmful text are recognised, because all that follows is
   measured by them.
1. Record the hidden states of the anchors, as text: the safety directions of each layer.
2. Record the calibration prompts as text, with a blank image and with pictures, and fit the
   gates (``gate_choice``). Set the thresholds on other, ordinary harmless prompts, so that the
   false-positive budget is kept with 95% confidence (``conformal``). Keep those gates beside the
   text gate with which most is found.
3. Try steering candidates on harmful calibration prompts with images, and keep the one under which
   fewest attacks succeed.
4. Test the guard on held-back prompts. If it does not help, raise an error.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.artifact.config import (
    Gate,
    GuardConfig,
    ImageMarkup,
    ModelIdentity,
    Steering,
    TextFrame,
)
from vlm_safeguard.calibration.budget import Budget, Effort
from vlm_safeguard.calibration.conformal import CONFIDENCE, check_enough
from vlm_safeguard.calibration.gate_choice import bound_scores, fit_gates, useful_gates
from vlm_safeguard.calibration.gate_fitting import GateFit, GateName, auc
from vlm_safeguard.calibration.held_out import prove
from vlm_safeguard.calibration.hidden_states import record_calibration
from vlm_safeguard.calibration.kept_states import states_folder
from vlm_safeguard.calibration.recognition import (
    BY_PHRASES,
    ByTokens,
    Recogniser,
    check_recognises,
)
from vlm_safeguard.calibration.recorded_states import States
from vlm_safeguard.calibration.steering_search import search
from vlm_safeguard.data.prompts import CalibrationData
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.fingerprint import config_digest, dtype_name, template_digest
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.text_only import find_markup
from vlm_safeguard.model.text_reader import TextReader
from vlm_safeguard.model.weights import weights_digest
from vlm_safeguard.model.words import find_frame
from vlm_safeguard.utils.matmul import MatmulPrecision, float32_products
from vlm_safeguard.utils.progress import Progress


def calibrate(
    loaded: LoadedModel,
    *,
    data: CalibrationData | None = None,
    budget: Budget | None = None,
    effort: Effort | None = None,
    reads_pictures: bool = False,
    refusals: Recogniser | Literal["tokens"] = BY_PHRASES,
    states: Path | None = None,
    matmul_precision: MatmulPrecision = "highest",
    progress: Progress | None = None,
) -> Guard:
    """Calibrate a guard for a model and test it on held-back prompts.

    Args:
        loaded: the model and its processor, see ``load``.
        data: calibration data; by default the data that ships with the package.
        budget: what the guard may cost on harmless requests.
        effort: number of prompts for each step.
        reads_pictures: whether the guard also reads the words in pictures (OCR).
        refusals: how a refusal is recognised (``recognition``); "tokens" learns the first tokens
            of refusals.
        states: folder that keeps recorded states, so that a calibration that was interrupted goes
            on from there; another budget takes them too. By default they are deleted.
        matmul_precision: of float32 matrix products where gates are fitted and the steering is
            searched for (``torch.set_float32_matmul_precision``): lower is faster on some
            processors. The thresholds are set, and the guard is tested, with the highest.
        progress: where progress is reported; by default nowhere.

    Raises:
        CalibrationError: the model's refusals of harmful text are not recognised, no candidate
            helps within the budget (the message says what was measured), or there are too few
            prompts to guarantee the budget.
        ModelError: the model cannot be guarded, or its hidden states are not finite.
    """
    data = data or CalibrationData.packaged()
    budget, effort = budget or Budget(), effort or Effort()
    progress = progress or Progress(quiet=True)
    began = time.monotonic()
    bound = evenly([p for p in data.bound if p.ordinary], effort.bound)
    check_enough(len({p.cluster for p in bound}), budget.false_positives)
    markup = find_markup(loaded)
    if refusals == "tokens":
        refusals = ByTokens.learned(loaded, data.anchors, progress)
    recognised = check_recognises(loaded, refusals, data.fit, effort.tokens, progress)
    with states_folder(states, loaded, matmul_precision) as folder:
        reads_sentences = TextReader(loaded.processor).framed
        with float32_products(matmul_precision):
            recorded = record_calibration(
                loaded, data, effort, reads_pictures, reads_sentences, folder, progress, refusals
            )
        pairs, directions = recorded.pairs, recorded.directions
        text, pictured = recorded.text, recorded.pictured
        fits = fit_gates(recorded, budget)
        epsilon = budget.false_positives
        scores = bound_scores(
            loaded,
            fits,
            bound,
            reads_pictures,
            reads_sentences,
            epsilon,
            folder,
            progress,
            refusals,
        )
        together = recorded.found_together(fits.texts, fits.vlm)
        fitted = useful_gates(fits, scores, epsilon, together)
        table = _separability(text, pictured, directions)
        gates = [
            _gate_rates(name, gate, pictured if name == "vlm" else {"text": text})
            for name, gate in fitted.items()
        ]
        base = _Foundation(
            loaded,
            directions,
            pairs,
            recorded.refusals,
            markup,
            fitted,
            find_frame(loaded),
            reads_pictures,
            reads_sentences,
            data.sha256,
        )
        verdict = any(gate.openings for gate in fitted.values())
        most, refusal = len(directions[0]), recorded.refusals is not None
        fit = list(data.fit)
        with float32_products(matmul_precision):
            guard, tried = search(
                loaded, base.build, verdict, refusal, most, fit, budget, effort, progress, refusals
            )
    proof = prove(loaded, guard, data.held, budget, effort, progress, refusals)
    results = {
        "seconds": round(time.monotonic() - began, 1),
        "matmul_precision": matmul_precision,
        "budget": {"false_positives": budget.false_positives, "kl": budget.kl},
        "refusals": {"by": refusals.name, "of_text": round(recognised, 4)},
        "separability": table,
        "gates": gates,
        "bound": {"n": len(scores), "confidence": CONFIDENCE},
        "candidates": tried,
        "proof": proof,
    }
    guard.config = guard.config.model_copy(update={"calibration": results})
    return guard


def _gate_rates(name: str, fit: GateFit, settings: dict[str, States]) -> dict[str, Any]:
    """True- and false-positive rates of a gate: per setting on the prompts it was fitted on, and
    cross-validated over all settings (``unseen``)."""
    rates: dict[str, dict[str, float]] = {"tpr": {}, "fpr": {}}
    for setting, states in settings.items():
        for kind, scores in zip(("tpr", "fpr"), states.scores(fit), strict=True):
            opened = (scores > 0).double().mean().item()
            rates[kind][setting] = round(opened, 4)
    unseen = dict(zip(rates, (round(rate, 4) for rate in fit.unseen_rates), strict=True))
    return {"source": name, "layers": list(fit.layers), **rates, "unseen": unseen}


def _separability(
    text: States, pictured: dict[str, States], directions: dict[int, Tensor]
) -> dict[str, Any]:
    """AUC of h . v1 and rates of the paper's gate (b = 0), for each setting and layer."""
    table: dict[str, Any] = {}
    for name, states in {"text": text, **pictured}.items():
        harmful, harmless = states.split()
        rows: dict[str, list[float]] = {"auc": [], "tpr_b0": [], "fpr_b0": []}
        for layer, basis in sorted(directions.items()):
            width = basis.shape[1]
            h, s = (part.layer(layer, slice(width)) @ basis[0] for part in (harmful, harmless))
            rows["auc"].append(round(auc(h, s), 4))
            rows["tpr_b0"].append(round((h > 0).double().mean().item(), 4))
            rows["fpr_b0"].append(round((s > 0).double().mean().item(), 4))
        table[name] = rows
    return table


@dataclass(frozen=True)
class _Foundation:
    """What all steering candidates share: directions, refusals, gates, markup, frame and data."""

    loaded: LoadedModel
    directions: dict[int, Tensor]
    pairs: Tensor
    refusals: Tensor | None
    markup: ImageMarkup
    gates: Mapping[GateName, GateFit]
    frame: TextFrame | None
    reads_pictures: bool
    reads_sentences: bool
    data_sha256: Mapping[str, str]

    def build(self, steering: Steering) -> Guard:
        """A guard with the fitted gates and this steering."""
        model = self.loaded.model
        decoder = find_decoder(model)
        tensors: dict[str, Tensor] = {}
        for layer in steering.layers:
            basis = self.directions[layer][: steering.rank].contiguous()
            tensors[f"directions.{layer}"] = basis
            harmful = self.pairs[0, :, layer, : decoder.hidden_size]
            tensors[f"anchor.{layer}"] = method.coordinates(harmful, basis).mean(0)
            if steering.later == "refusal" and self.refusals is not None:
                tensors[f"refusal.{layer}"] = method.coordinates(self.refusals[:, layer], basis)
        gates: list[Gate] = []
        for name, fit in self.gates.items():
            # A pooled score has one threshold; it stands with the gate's first layer.
            cuts = [fit.threshold] + [0.0] * (len(fit.layers) - 1)
            gate: dict[str, Any] = {
                "kind": "intent" if fit.openings else "linear",
                "source": "vlm" if name == "vlm" else "text",
                "layers": list(fit.layers),
                "thresholds": cuts,
                "reads_mean": fit.vectors.shape[1] > decoder.hidden_size,
                "reads_probe": fit.vectors.shape[1] > 2 * decoder.hidden_size,
                "openings": list(fit.openings),
                "intent_weight": fit.weights[0],
                "verdict_weight": fit.weights[1],
            }
            tensors[f"gate.{len(gates)}"] = fit.vectors.contiguous()
            gates.append(Gate.model_validate(gate))
        config = GuardConfig(
            model=ModelIdentity(
                name=Path(self.loaded.name).name,
                config_sha256=config_digest(model),
                weights_sha256=weights_digest(model),
                template_sha256=template_digest(self.loaded.processor),
                dtype=dtype_name(model),
                revision=self.loaded.revision,
                hidden_size=decoder.hidden_size,
                layers=len(decoder.layers),
            ),
            markup=self.markup,
            frame=self._needed(gates),
            gates=gates,
            steering=steering,
            reads_pictures=self.reads_pictures,
            reads_sentences=self.reads_sentences,
            data_sha256=dict(self.data_sha256),
        )
        return Guard(config, tensors)

    def _needed(self, gates: Sequence[Gate]) -> TextFrame | None:
        """The frame, as far as these gates need it."""
        if self.frame is None or not any(gate.reads_mean for gate in gates):
            return None
        if any(gate.reads_probe for gate in gates):
            return self.frame
        return self.frame.model_copy(update={"probe": []})
