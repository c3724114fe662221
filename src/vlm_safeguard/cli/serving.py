"""The commands of the server: ``serve`` and ``audit``."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm_safeguard.cli.options import (
    GuardName,
    Json,
    Model,
    Port,
    Quiet,
    extra_needed,
    guard_or_default,
    loads_models,
    make_progress,
    print_json,
)
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.load_options import LoadOptions

app = typer.Typer()


@app.command()
@loads_models
def serve(
    model: Model = "embedded",
    guard: GuardName = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Port = 8000,
    mode: Annotated[
        Literal["enforce", "refuse", "monitor"],
        typer.Option(help="Steer the answer, refuse at once, or only watch."),
    ] = "enforce",
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What runs the model (vLLM has an environment of its own)."),
    ] = "transformers",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs that share the model (--engine vllm).")
    ] = 1,
    served_name: Annotated[
        str | None, typer.Option(help="Model name in the API (default: MODEL).")
    ] = None,
    refusal: Annotated[
        str, typer.Option(help="Answer in mode refuse.")
    ] = "I can't help with that request.",
    batch: Annotated[int, typer.Option(min=1, max=256, help="Requests answered together.")] = 8,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait (429 beyond).")] = 64,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds for a whole request.")] = 300.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Longest prompt, in tokens, images included.")
    ] = 4096,
    audit: Annotated[Path | None, typer.Option(help="File of the audit log.")] = None,
    audit_content: Annotated[
        bool, typer.Option("--audit-content", help="Also log requests and answers in full.")
    ] = False,
    *,
    options: LoadOptions,
    quiet: Quiet = False,
) -> None:
    """Serve MODEL under a guard, with OpenAI's chat API.

    API keys come from the environment: VLM_SAFEGUARD_API_KEYS may ask, VLM_SAFEGUARD_TRUSTED_KEYS
    also see gate scores (both separated by commas). Without keys it listens on loopback only.
    """
    from vlm_safeguard.utils.network import LOOPBACK, address, listen

    with extra_needed("serving", "serve", ()):
        import uvicorn

        from vlm_safeguard.server.app import create_app
        from vlm_safeguard.server.audit import AuditLog
        from vlm_safeguard.server.auth import KEYS, TRUSTED_KEYS, keys_from
        from vlm_safeguard.server.listen import uvicorn_config
        from vlm_safeguard.server.settings import Settings
        from vlm_safeguard.server.start import start_engine
        from vlm_safeguard.server.telemetry import JsonFormatter

    guard = guard_or_default(model, guard)
    if tensor_parallel > 1 and engine != "vllm":
        raise SafeguardError("--tensor-parallel is for --engine vllm: leave it out, or choose that")
    if audit_content and audit is None:
        raise SafeguardError("--audit-content needs --audit FILE")
    settings = Settings(
        model=served_name or model,
        mode=mode,
        refusal=refusal,
        batch=batch,
        waiting=waiting,
        deadline=deadline,
        max_tokens=max_tokens,
        default_tokens=min(Settings.default_tokens, max_tokens),
        max_prompt_tokens=max_prompt_tokens,
        api_keys=keys_from(KEYS),
        trusted_keys=keys_from(TRUSTED_KEYS),
    )
    if settings.open and host not in LOOPBACK:
        raise SafeguardError(
            f"{host} is not loopback: set {KEYS} or {TRUSTED_KEYS}, so that not everybody may ask"
        )
    log = AuditLog(audit, audit_content) if audit else None
    with listen(host, port) as listener:  # before long work: a taken port shows at once
        progress = make_progress(quiet)
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler])
        running = start_engine(
            engine, model, guard, options, settings, progress.say, tensor_parallel
        )
        progress.say(f"ready: {address(listener, host)}/v1 ({settings.model}, mode {mode})")
        server = uvicorn.Server(uvicorn_config(create_app(running, log), settings))
        with suppress(KeyboardInterrupt):  # uvicorn has shut down in order by then
            server.run(sockets=[listener])


@app.command()
def audit(
    log: Annotated[Path, typer.Argument(help="File of the audit log.")],
    json_: Json = False,
) -> None:
    """Summarize the audit log of a server, rotated files included."""
    from vlm_safeguard.server.audit import entries, summarise

    found = summarise(entries(log))
    if json_:
        print_json(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items()) or "-"
        print(f"{name:18} {value}")
