"""A witness inside the model that knows nothing of the guard.

A guard that opens for everybody and restores the anchors' coordinates changes every row behind each
steered layer. So the next layer's input differs from what the steered layer put out; where it is
the same, the guard did not act, whatever it says about itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

from torch import Tensor

from vlm_safeguard.model.residual_stream import find_decoder, hidden_of


class Witness:
    """Counts rows of logits that left the model: each is a token that could be served.

    What the guard withholds by raising an error does not count.

    Attributes:
        guarded: rows of calls in which every steered layer's output was changed in every row.
        unguarded: rows of other calls.
    """

    def __init__(self, model: Any, steered: Sequence[int]) -> None:
        self.guarded = self.unguarded = 0
        self._steered = tuple(steered)
        self._left: dict[int, Tensor] = {}
        self._changed: dict[int, bool] = {}
        for number, layer in enumerate(find_decoder(model).layers):
            layer.__class__ = self._layer_class(type(layer), number)
        model.__class__ = self._model_class(type(model))

    def reset(self) -> None:
        self.guarded = self.unguarded = 0

    def _model_class(self, own: type) -> type:
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._changed.clear()
            output = own.__call__(model, *args, **kwargs)  # type: ignore[operator]
            # The guard let these logits out.
            rows = len(output.logits)
            if all(self._changed.get(layer, False) for layer in self._steered):
                self.guarded += rows
            else:
                self.unguarded += rows
            return output

        return type(own.__name__, (own,), {"__call__": call})

    def _layer_class(self, own: type, number: int) -> type:
        @wraps(own.forward)  # type: ignore[attr-defined]
        def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
            entering = args[0] if args else kwargs["hidden_states"]
            before = self._left.pop(number - 1, None)
            if before is not None:
                self._changed[number - 1] = bool((entering[:, -1] != before).any(1).all())
            output = own.forward(layer, *args, **kwargs)  # type: ignore[attr-defined]
            if number in self._steered:
                self._left[number] = hidden_of(output)[:, -1].clone()
            return output

        return type(own.__name__, (own,), {"forward": forward})
