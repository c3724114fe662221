"""A second implementation of a guarded model, for one unpadded request, from the formulas.

It shares no code with the package: a plain loop over the decoder's layers, the whole sequence
every time, no cache, no hooks, position by position.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests import tiny

CLOSE = {"atol": 2e-4, "rtol": 1e-3}
GATES = [tiny.gate("text", 5), tiny.gate("vlm", 2)]


@dataclass
class Known:
    """What a request's prompt decided."""

    scores: dict[int, dict[int, float]] = field(default_factory=dict)  # gate -> layer -> score
    text: dict[int, Tensor] = field(default_factory=dict)  # layer -> coordinates, text-only pass
    own: dict[int, Tensor] = field(default_factory=dict)  # layer -> coordinates, own pass


class Reference:
    def __init__(self, model, guard, prompt):
        self.model, self.guard, self.prompt = model, guard, list(prompt)
        self.decoder = model.get_decoder()
        self.gates, self.steer = guard.config.gates, guard.config.steering
        self.known = Known()
        with torch.no_grad():
            self._witness()
            self.logits([])

    def _scores(self, source, layer, state):
        for index, gate in enumerate(self.gates):
            if gate.source == source and layer in gate.layers:
                place = gate.layers.index(layer)
                vector = self.guard.tensors[f"gate.{index}"][place]
                score = float(state[: len(vector)] @ vector) - gate.thresholds[place]
                self.known.scores.setdefault(index, {})[layer] = score

    def _witness(self):
        frame, text = self.guard.config.frame, tiny.without_pictures(self.prompt)
        probe = frame.probe if frame else []
        for layer, every in self._layers(self._embed(text + probe, False)):
            states = every[: len(text)]
            seen = states[-1]
            if frame:
                words = states[frame.before : len(states) - frame.after]
                if not len(words):
                    words = states[frame.before :]
                end = every[len(text) :][-1:].flatten()  # of the probe, if there is one
                seen = torch.cat([seen, words.double().mean(0).float(), end])
            self._scores("text", layer, seen)
            if layer in self.steer.layers:
                self.known.text[layer] = self.guard.tensors[f"directions.{layer}"] @ states[-1]

    def is_open(self, layer, source=None, at_prompt=False):
        """Whether any gate is open for a layer."""
        opened = []
        for index, gate in enumerate(self.gates):
            scores = self.known.scores.get(index, {})
            if source not in (None, gate.source):
                continue
            if gate.per_layer:
                opened.append(scores.get(layer, -1) > 0)
            elif len(scores) == len(gate.layers):
                early = gate.source == "vlm" and layer < max(gate.layers)
                if not (at_prompt and early):
                    opened.append(sum(scores.values()) > 0)
        return any(opened)

    @property
    def fired(self):
        return any(self.is_open(layer) for layer in range(tiny.LAYERS))

    def _steered(self, layer, state, column):
        rows = self.guard.tensors[f"directions.{layer}"]
        coordinates = rows @ state
        if self.steer.mode == "erase":
            return state - rows.T @ coordinates
        if self.steer.mode == "add":
            table = self.known.text if self.steer.query == "text" else self.known.own
            return state + self.steer.alpha * (rows.T @ table[layer])
        target = self.guard.tensors[f"anchor.{layer}"]
        only_vlm = all(gate.source == "vlm" for gate in self.gates)
        if self.steer.reference == "text" and (only_vlm or self.is_open(layer, "text")):
            target = self.known.text[layer]
        behind = column - len(self.prompt) + 1  # so many tokens of the answer
        if self.steer.later == "refusal" and behind > 0:
            target = self.guard.tensors[f"refusal.{layer}"][behind - 1]
        return state - rows.T @ coordinates + (1 + self.steer.alpha) * (rows.T @ target)

    def _doses(self, column):
        """Whether a column is one that steering may touch."""
        q = len(self.prompt) - 1
        if column < q:
            return self.steer.positions == "all"
        return self.steer.tokens is None or column < q + self.steer.tokens

    def _embed(self, ids, pictures):
        embedded = self.model.get_input_embeddings()(torch.tensor([ids]))
        if pictures and tiny.IMAGE in ids:
            pixels = tiny.batch([self.prompt])["pixel_values"]
            features = torch.cat(list(self.model.get_image_features(pixels).pooler_output))
            embedded[torch.tensor([ids]) == tiny.IMAGE] = features
        return embedded

    def _layers(self, hidden, steer=False):
        """Yield (layer, states (T, d)) of one sequence."""
        places = torch.arange(hidden.shape[1])[None]
        rotary = self.decoder.rotary_emb(hidden, position_ids=places)
        q = len(self.prompt) - 1
        for layer, block in enumerate(self.decoder.layers):
            hidden = block.forward(hidden, position_embeddings=rotary, position_ids=places).clone()
            if steer:
                if layer in self.steer.layers:
                    rows = self.guard.tensors[f"directions.{layer}"]
                    self.known.own[layer] = rows @ hidden[0, q]
                self._scores("vlm", layer, hidden[0, q])
                if layer in self.steer.layers:
                    for column in range(hidden.shape[1]):
                        if self._doses(column) and self.is_open(layer, at_prompt=column <= q):
                            hidden[0, column] = self._steered(layer, hidden[0, column], column)
            yield layer, hidden[0]

    @torch.no_grad()
    def logits(self, generated):
        """Logits (T, vocabulary) of the prompt and what was generated after it."""
        for _, states in self._layers(self._embed(self.prompt + generated, True), steer=True):  # noqa: B007
            pass
        return self.model.lm_head(self.decoder.norm(states))

    def greedy(self, count):
        """Greedily generated tokens and their logits."""
        generated, table = [], []
        for _ in range(count):
            table.append(self.logits(generated)[-1])
            generated.append(int(table[-1].argmax()))
        return generated, torch.stack(table)


def calibrated(model, prompts, gates=GATES, **steering):
    """A guard that opens for some of the prompts, and their references: its thresholds lie between
    their scores."""
    made = tiny.guard(model, gates, **({"tokens": 3} | steering))
    known = [Reference(model, made, prompt).known.scores for prompt in prompts]
    thresholds = []
    for index, one in enumerate(made.config.gates):
        scores = torch.tensor([[k[index][layer] for layer in one.layers] for k in known])
        if one.per_layer:
            thresholds.append(scores.quantile(0.7, 0).tolist())
        else:
            middle = float(scores.sum(1).quantile(0.7))
            thresholds.append([middle / len(one.layers)] * len(one.layers))
    made = tiny.with_thresholds(made, thresholds)
    references = [Reference(model, made, prompt) for prompt in prompts]
    assert 0 < sum(r.fired for r in references) < len(references)
    return made, references


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def holds(references, tokens, logits, copies=1):
    """Each row's logits are the reference's for its prompt and its tokens."""
    assert len(tokens) == copies * len(references)
    for row, (answer, table) in enumerate(zip(tokens.tolist(), logits, strict=True)):
        expected = references[row // copies].logits(answer[:-1])[-len(answer) :]
        close(table, expected)
