"""The command ``playground``."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm_safeguard.cli.options import (
    GuardName,
    MaxNewTokens,
    Model,
    Port,
    Quiet,
    extra_needed,
    guard_or_default,
    load_model,
    loads_models,
    make_progress,
    read_guard,
)
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.load_options import LoadOptions

app = typer.Typer()


@app.command()
@loads_models
def playground(
    model: Model = "embedded",
    guard: GuardName = None,
    host: Annotated[
        str, typer.Option(help="Loopback address to listen on; others are refused.")
    ] = "127.0.0.1",
    port: Port = 8080,
    max_new_tokens: MaxNewTokens = 64,
    *,
    options: LoadOptions,
    quiet: Quiet = False,
) -> None:
    """Open a page with unguarded and guarded answers side by side.

    It is for this machine only: it listens on loopback, loads nothing from elsewhere and keeps no
    requests.
    """
    from vlm_safeguard.utils.network import LOOPBACK, address, listen

    with extra_needed("the playground", "playground", ()):
        from vlm_safeguard.playground.anchors import anchor_map
        from vlm_safeguard.playground.answers import Answerer
        from vlm_safeguard.playground.desk import Desk
        from vlm_safeguard.playground.serve import serve

    guard = guard_or_default(model, guard)
    if host not in LOOPBACK:
        raise SafeguardError(
            f"{host} is not loopback: the playground shows unguarded answers and is for this "
            "machine only (`vlm-safeguard serve` is for others)"
        )
    with listen(host, port) as listener:  # before long work: a taken port shows at once
        progress = make_progress(quiet)
        artifact = read_guard(guard)
        loaded = load_model(model, options, progress)
        artifact.check_model(loaded.model, loaded.processor)
        answerer = Answerer(loaded, artifact, max_new_tokens)
        anchors = anchor_map(loaded, artifact, answerer.layer, progress)
        progress.say(f"ready: {address(listener, host)} (Ctrl-C ends it)")
        serve(Desk(answerer, anchors, model, guard), listener)
