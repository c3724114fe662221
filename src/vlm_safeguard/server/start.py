"""Makes the inference thread that an operator asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vlm_safeguard.data.ocr import reader
from vlm_safeguard.embedded.assemble import resolve
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.server.inference_thread import InferenceThread
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry

Kind = Literal["transformers", "vllm"]


def start_engine(
    kind: Kind,
    model: str,
    guard: str,
    options: LoadOptions,
    settings: Settings,
    say: Callable[[str], None],
    ranks: int = 1,
) -> InferenceThread:
    """Load a model, put a guard to work on it, and start the thread.

    Args:
        kind: what runs the model. vLLM can be started once in a process.
        model: a folder or hub name, or "embedded".
        guard: a folder or hub name, or "embedded".
        options: how the model is loaded.
        settings: mode and limits.
        say: takes what is being done.
        ranks: GPUs that share the model, in vLLM.

    Raises:
        SafeguardError: model or guard cannot be loaded or do not belong together, vLLM is missing
            or cannot be guarded, or the self-check fails.
    """
    artifact = Guard.from_pretrained(guard)
    if artifact.config.reads_pictures:
        reader()  # what it needs may be missing
    folder = resolve(model, say)
    say(f"loading {model}")
    made: InferenceThread
    if kind == "vllm":
        from vlm_safeguard.engines.vllm.llm import load_in_vllm
        from vlm_safeguard.server.vllm_engine import VllmEngine

        llm = load_in_vllm(
            str(folder),
            guard,
            mode="monitor" if settings.mode == "monitor" else "enforce",
            options=options,
            max_len=settings.max_prompt_tokens + settings.max_tokens,
            batch=settings.batch,
            images=settings.max_images,
            ranks=ranks,
        )
        made = VllmEngine(llm, artifact.config.reads_pictures, settings, Telemetry())
    else:
        from vlm_safeguard.model.loading import load
        from vlm_safeguard.server.transformers_engine import TransformersEngine

        loaded = load(folder, **options.given())
        made = TransformersEngine(loaded, artifact, settings, Telemetry())
    say("putting the guard to work")
    made.start()
    return made
