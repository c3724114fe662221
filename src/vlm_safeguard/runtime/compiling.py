"""Handles ``torch.compile``: refuses models compiled before attaching, keeps hooks untraced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn

from vlm_safeguard.errors import GuardError


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model that is compiled, whole or in part: its hooks might be ignored.

    Raises:
        GuardError: names the compiled part.
    """
    for name, module in model.named_modules():
        if (
            module._compiled_call_impl is not None
            or "_orig_mod" in module._modules
            or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        ):
            raise GuardError(
                f"the model is compiled{f' at {name}' if name else ''}: hooks put in after "
                "torch.compile are ignored. Attach the guard first, then compile"
            )


def forget_compiled() -> None:
    """Have whatever this process compiled compiled anew: a function that holds the model (a
    compiled ``model.forward``) leaves no trace on it, and would go on without the hooks."""
    torch.compiler.reset()


def untraced(hook: Callable) -> Callable:
    """The hook as one that torch.compile steps around: what it does depends on the request.

    What does the stepping around takes as long as the hook itself, or longer, so it is there for
    code that is being compiled alone.
    """
    outside = torch.compiler.disable(hook)

    @wraps(hook)
    def either(*args: Any) -> Any:
        return outside(*args) if torch.compiler.is_dynamo_compiling() else hook(*args)

    return either


def uncompiled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``generate`` that keep it from compiling the model by itself (static caches).

    As an argument, which counts before any ``generation_config``.
    """
    return {**options, "disable_compile": True}
