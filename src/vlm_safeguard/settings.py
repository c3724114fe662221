"""What a guard is set to: the contents of ``guard.json``, validated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gate(_Strict):
    """One linear gate: scores at ``layers``, pooled by sum or deciding layer by layer.

    ``source`` "text" reads the text-only pass through the LLM (the witness), "vlm" the request's
    own pass. With ``per_layer`` each layer's score opens that layer alone (the paper's form).
    """

    source: Literal["text", "vlm"]
    layers: list[int] = Field(min_length=1)
    thresholds: list[FiniteFloat]
    per_layer: bool = False

    @model_validator(mode="after")
    def _one_threshold_each(self) -> Gate:
        if len(self.thresholds) != len(self.layers) or len(set(self.layers)) != len(self.layers):
            raise ValueError("a gate needs one threshold per layer, each layer once")
        return self


class Steering(_Strict):
    """What happens where a gate is open. ``tokens``: guarded generated tokens, None for all."""

    mode: Literal["add", "restore", "erase", "defer"]
    reference: Literal["text", "anchor"] = "text"
    query: Literal["pass", "text"] = "text"
    positions: Literal["generated", "all"] = "generated"
    layers: list[int] = []
    rank: int = Field(default=1, ge=1)
    alpha: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _layers_to_work_on(self) -> Steering:
        if (self.mode == "defer") == bool(self.layers):
            raise ValueError("every mode but `defer` steers at least one layer, `defer` none")
        return self


class ModelIdentity(_Strict):
    """Which model a guard belongs to."""

    name: str
    config_sha256: str
    weights_sha256: str
    template_sha256: str
    hidden_size: int
    layers: int


class Markup(_Strict):
    """See ``witness.ImageMarkup``."""

    token_ids: list[int] = Field(min_length=1)
    before: list[int] = []
    after: list[int] = []
    pad_id: int = 0


class GuardConfig(_Strict):
    """Everything in ``guard.json``."""

    schema_version: Literal[1] = 1
    model: ModelIdentity
    markup: Markup
    gates: list[Gate] = Field(min_length=1)
    steering: Steering

    @model_validator(mode="after")
    def _defer_by_text(self) -> GuardConfig:
        if self.steering.mode == "defer" and any(g.source != "text" for g in self.gates):
            raise ValueError("`defer` is decided before the picture is read: text gates only")
        return self

    data_sha256: dict[str, str] = {}
    calibration: dict[str, Any] = {}
    tensors_sha256: str = ""
