"""The configuration of a guard, the contents of ``guard.json``: pydantic models and size limits."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

SCHEMA_VERSION = 2

# Far above any real guard; docs/guard-format.md states each of them.
MAX_MODEL_LAYERS = 1024
MAX_HIDDEN_SIZE = 65_536
MAX_RANK = 1024
MAX_GATES = 16
MAX_OPENINGS = 64
MAX_MARKUP_TOKENS = 256  # in each of the three lists
MAX_FRAME = 65_536  # tokens
MAX_PROBE = 256  # tokens
MAX_TOKEN_ID = 2**31 - 1
MAX_GUARDED_TOKENS = 1_000_000
MAX_REFUSAL_TOKENS = 64  # guarded tokens with `later` "refusal"
MAX_ALPHA = 1e4
MAX_MAGNITUDE = 1e20  # of thresholds and of every tensor's values: sums of them fit float32
MAX_DATA_FILES = 64
MAX_NAME = 256  # characters

# No control characters, line separators or lone surrogates: such names break terminals and logs.
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
_Name = Annotated[str, Field(max_length=MAX_NAME, pattern=_PRINTABLE)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_DtypeOrNone = Annotated[str, Field(pattern=r"^(float32|bfloat16|float16)?$")]
_Sha256OrNone = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
_Registered = Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,31}$")]
_Layer = Annotated[int, Field(ge=0, lt=MAX_MODEL_LAYERS)]
_TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
_Threshold = Annotated[FiniteFloat, Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)]


class _StrictSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gate(_StrictSettings):
    """One gate. It scores hidden states at ``layers`` and opens if a score is above 0.

    Attributes:
        kind: name of a class in ``runtime.gate.GATES``.
        source: the pass it reads: "text" is the text-only pass, "vlm" the request's own pass.
        thresholds: one for each layer, subtracted from its score.
        reads_mean: whether it reads, beside the state at the last prompt token, the mean of the
            states over the words of the text.
        reads_probe: whether it reads the state at the end of the probe too (``TextFrame``).
        per_layer: False: the sum of the scores opens all layers. True: each score opens its own
            layer only, as in the paper.
        openings: tokens that the LLM's refusals begin with, for the kind "intent".
        intent_weight: weight of their log-probability, which is added to the score.
        verdict_weight: added to the score if the LLM's most probable first token is one of them.
    """

    kind: _Registered = "linear"
    source: Literal["text", "vlm"]
    layers: list[_Layer] = Field(min_length=1, max_length=MAX_MODEL_LAYERS)
    thresholds: list[_Threshold] = Field(max_length=MAX_MODEL_LAYERS)
    per_layer: bool = False
    reads_mean: bool = False
    reads_probe: bool = False
    openings: list[_TokenId] = Field(default=[], max_length=MAX_OPENINGS)
    intent_weight: float = Field(default=0.0, ge=0.0, le=MAX_MAGNITUDE, allow_inf_nan=False)
    verdict_weight: float = Field(default=0.0, ge=0.0, le=MAX_MAGNITUDE, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_threshold_each(self) -> Gate:
        if len(self.thresholds) != len(self.layers) or len(set(self.layers)) != len(self.layers):
            raise ValueError("a gate needs one threshold per layer, each layer once")
        return self

    @model_validator(mode="after")
    def _mean_is_of_the_text(self) -> Gate:
        if self.reads_mean and (self.source != "text" or self.per_layer):
            raise ValueError("a gate with reads_mean reads the text-only pass, all layers together")
        if self.reads_probe and not self.reads_mean:
            raise ValueError("a gate with reads_probe has reads_mean too")
        return self

    @property
    def states_read(self) -> int:
        """How many states of a layer it reads, one behind the other."""
        return 1 + self.reads_mean + self.reads_probe

    @model_validator(mode="after")
    def _intent_is_of_the_text(self) -> Gate:
        if (self.kind == "intent") != bool(self.openings) or len(set(self.openings)) != len(
            self.openings
        ):
            raise ValueError("a gate of kind intent, and no other, has openings, each once")
        if self.openings and (self.source != "text" or self.per_layer):
            raise ValueError("a gate of kind intent reads the text-only pass, all layers together")
        if any((self.intent_weight, self.verdict_weight)) != bool(self.openings):
            raise ValueError("openings have a weight above 0, and only they")
        return self


class Steering(_StrictSettings):
    """What happens if a gate is open.

    Attributes:
        mode: name of a class in ``runtime.steering.MODES``.
        reference: what ``restore`` restores: the coordinates of the text-only pass ("text"), the
            mean of the harmful anchors ("anchor"), or the middle between both where the verdict
            says that the LLM would refuse the text, and the anchors' mean elsewhere ("verdict").
        query: the pass whose coordinates ``add`` adds: the request's own, or the text-only pass.
        positions: "generated" steers the last prompt token and what follows, "all" also the rest of
            the prompt.
        layers: steered layers.
        rank: directions per layer.
        alpha: strength.
        tokens: number of guarded generated tokens; None for all.
        later: what ``restore`` restores behind the first token of the answer: the same as at the
            last prompt token ("same"), or what the LLM's own refusals of the anchors have at this
            token on average ("refusal").
    """

    mode: _Registered
    reference: Literal["text", "anchor", "verdict"] = "text"
    query: Literal["pass", "text"] = "text"
    positions: Literal["generated", "all"] = "generated"
    layers: list[_Layer] = Field(min_length=1, max_length=MAX_MODEL_LAYERS)
    rank: int = Field(default=1, ge=1, le=MAX_RANK)
    alpha: float = Field(default=0.0, ge=0.0, le=MAX_ALPHA, allow_inf_nan=False)
    tokens: int | None = Field(default=None, ge=1, le=MAX_GUARDED_TOKENS)
    later: Literal["same", "refusal"] = "same"

    @model_validator(mode="after")
    def _a_refusal_is_short(self) -> Steering:
        if self.later == "refusal" and (
            self.mode != "restore" or not 2 <= (self.tokens or 0) <= MAX_REFUSAL_TOKENS
        ):
            raise ValueError(
                f"later `refusal` needs mode `restore` and 2 to {MAX_REFUSAL_TOKENS} tokens"
            )
        return self

    @model_validator(mode="after")
    def _each_layer_once(self) -> Steering:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("a layer is steered once")
        return self


class ModelIdentity(_StrictSettings):
    """The model a guard belongs to. ``template_sha256`` or ``dtype`` is "" if not recorded.

    ``revision``: the model's commit on the hub, for people; "" if it was a folder.
    """

    name: _Name
    config_sha256: _Sha256
    weights_sha256: _Sha256
    template_sha256: _Sha256OrNone
    dtype: _DtypeOrNone = ""
    revision: _Name = ""
    hidden_size: int = Field(ge=1, le=MAX_HIDDEN_SIZE)
    layers: int = Field(ge=1, le=MAX_MODEL_LAYERS)


class ImageMarkup(_StrictSettings):
    """How a picture is written in the token ids: ``before``, image tokens, ``after``.

    Attributes:
        token_ids: ids that occur in pictures only: image tokens, ends of rows and tiles.
        before, after: ids that the template writes around a picture and leaves out without one,
            such as LLaVA's newline or Qwen's vision start and end.
        inner: ids of ordinary text, such as a newline between two rows of tiles. They belong to a
            picture only between two of its ``token_ids``.
        pad_id: pads the text-only pass.
    """

    token_ids: list[_TokenId] = Field(min_length=1, max_length=MAX_MARKUP_TOKENS)
    before: list[_TokenId] = Field(default=[], max_length=MAX_MARKUP_TOKENS)
    after: list[_TokenId] = Field(default=[], max_length=MAX_MARKUP_TOKENS)
    inner: list[_TokenId] = Field(default=[], max_length=MAX_MARKUP_TOKENS)
    pad_id: _TokenId = 0

    def kept(self, ids: list[int]) -> list[int]:
        """Indices of ``ids`` without pictures and the tokens around them.

        Tokens around a picture are removed outwards from it, as far as they match. Newlines that
        merged into one token with those of the text stay, as white space.
        """
        tokens, place = set(self.token_ids), 0
        kept: list[int] = []
        while place < len(ids):
            if ids[place] not in tokens:
                kept.append(place)
                place += 1
                continue
            before = place - 1
            for token in reversed(self.before):
                if not kept or kept[-1] != before or ids[before] != token:
                    break
                kept.pop()
                before -= 1
            place = self._end(ids, place)
            for token in self.after:
                if place == len(ids) or ids[place] != token:
                    break
                place += 1
        return kept

    def _end(self, ids: list[int], place: int) -> int:
        """One past the last token of the picture that stands at ``place``."""
        end = place
        while place < len(ids) and (ids[place] in self.token_ids or ids[place] in self.inner):
            place += 1
            if ids[place - 1] in self.token_ids:
                end = place
        return end


class TextFrame(_StrictSettings):
    """What stands around a request's words in the text-only pass.

    Attributes:
        before, after: numbers of tokens that the chat template writes before and behind them.
        probe: tokens that the guard adds behind the text: the beginning of an answer that says
            what the request would do. They are no part of the text: its last token is that before
            them.
    """

    before: int = Field(ge=0, le=MAX_FRAME)
    after: int = Field(ge=0, le=MAX_FRAME)
    probe: list[_TokenId] = Field(default=[], max_length=MAX_PROBE)


class GuardConfig(_StrictSettings):
    """Everything in ``guard.json``."""

    schema_version: Literal[2] = 2
    model: ModelIdentity
    markup: ImageMarkup
    frame: TextFrame | None = None  # for gates with ``reads_mean``
    gates: list[Gate] = Field(min_length=1, max_length=MAX_GATES)
    steering: Steering
    reads_pictures: bool = False  # the text-only pass includes the words in pictures
    reads_sentences: bool = False  # text gates also read each sentence by itself
    data_sha256: dict[_Name, _Sha256] = Field(default={}, max_length=MAX_DATA_FILES)
    calibration: dict[str, Any] = {}
    tensors_sha256: _Sha256OrNone = ""  # "" while a guard is made; no file is without it

    @property
    def probe(self) -> list[int]:
        """The tokens that the guard adds behind a text; may be none."""
        return self.frame.probe if self.frame else []

    @model_validator(mode="after")
    def _gates_reach_layers(self) -> GuardConfig:
        """Refuse a gate that could open without steering anything (see ``Request.open_at``)."""
        steering = self.steering
        if steering.reference == "verdict" and not any(gate.openings for gate in self.gates):
            raise ValueError("reference `verdict` needs a gate of kind intent, for verdicts")
        if any(gate.reads_mean for gate in self.gates) != (self.frame is not None):
            raise ValueError("gates with reads_mean need a frame, and no others do")
        if any(gate.reads_probe for gate in self.gates) != bool(self.probe):
            raise ValueError("gates with reads_probe need a frame with a probe, and no others do")
        if set(self.probe) & set(self.markup.token_ids):
            raise ValueError("a probe holds no image tokens")
        for index, gate in enumerate(self.gates):
            if gate.per_layer and not set(gate.layers) & set(steering.layers):
                raise ValueError(
                    f"gate {index} opens layers one by one, and none of them is steered"
                )
            late = gate.source == "vlm" and not gate.per_layer and steering.tokens == 1
            if late and max(gate.layers) > max(steering.layers):
                raise ValueError(
                    f"gate {index} is decided above every steered layer, and with `tokens` 1 no "
                    "later token is steered: it would open and change nothing"
                )
        return self

    @field_validator("calibration")
    @classmethod
    def _budget_in_numbers(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The record has any form. Only its budget is used (by the doctor), so it is checked."""
        budget = record.get("budget", {})
        if not isinstance(budget, dict) or any(
            isinstance(value, bool) or not isinstance(value, (int, float))
            for value in budget.values()
        ):
            raise ValueError("the budget of a calibration consists of named numbers")
        return record

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in ``guard.safetensors``, which has no others."""
        width, steering = self.model.hidden_size, self.steering
        found: dict[str, tuple[int, ...]] = {}
        for layer in steering.layers:
            found[f"directions.{layer}"] = (steering.rank, width)
            found[f"anchor.{layer}"] = (steering.rank,)
            if steering.later == "refusal":
                found[f"refusal.{layer}"] = ((steering.tokens or 1) - 1, steering.rank)
        for index, gate in enumerate(self.gates):
            found[f"gate.{index}"] = (len(gate.layers), gate.states_read * width)
        return found

    def tensor_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return 4 * sum(math.prod(shape) for shape in self.shapes().values())
