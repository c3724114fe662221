"""The operator through which a decoder layer shows the guard its output.

A compiled graph keeps what a Python hook did when it was traced, not the hook. An operator it runs
each time, and vLLM splits its graphs at the operators that it is told, so that a CUDA graph holds
none of them.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vlm_safeguard.engines.vllm.step import Step, parts_of

OPERATOR = "vlm_safeguard::visit"


class _StepOfThread(threading.local):
    """The step that runs in this thread. None in a warm-up, whose tokens are nobody's.

    Where vLLM ran layers in other threads (microbatches, which are refused), they would show their
    output to no step, and the step would not end: ``Step.finish``.
    """

    step: Step | None = None


_running = _StepOfThread()


def run(step: Step | None) -> None:
    """Let the layers that run in this thread from now on show their output to ``step``."""
    _running.step = step


def show(layer: nn.Module, inputs: Any, output: Any, *, number: int) -> None:
    """A forward hook for decoder layer ``number``. It can be traced.

    Raises:
        GuardRuntimeError: as ``parts_of``.
    """
    hidden, residual = parts_of(output)
    torch.ops.vlm_safeguard.visit(hidden, residual, number)


def visit(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """What the operator does: both tensors may be changed in place."""
    step = _running.step
    if step is not None:
        step.visit(layer, hidden, residual)


def _traced(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    return None


_library = torch.library.Library("vlm_safeguard", "DEF")  # the operator lives as long as this
_library.define("visit(Tensor(a!) hidden, Tensor(b!)? residual, int layer) -> ()")
_library.impl("visit", visit, dispatch_key="CompositeExplicitAutograd")
_library.impl("visit", _traced, dispatch_key="Meta")
