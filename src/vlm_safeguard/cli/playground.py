"""The command ``playground``."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm_safeguard.cli.options import MaxNewTokens, Quiet, load_model, loads_models, make_progress
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.load_options import LoadOptions

app = typer.Typer()


@app.command()
@loads_models
def playground(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or 'embedded'.")] = "embedded",
    guard: Annotated[
        str | None, typer.Option(help="Guard folder or hub name (default: the embedded model's).")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Loopback address to listen on; others are refused.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    max_new_tokens: MaxNewTokens = 64,
    *,
    options: LoadOptions,
    quiet: Quiet = False,
) -> None:
    """Open a page with unguarded and guarded answers side by side.

    It is for this machine only: it listens on loopback, loads nothing from elsewhere and keeps no
    requests.
    """
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.utils.network import LOOPBACK, address, listen

    try:
        from vlm_safeguard.playground.anchors import anchor_map
        from vlm_safeguard.playground.answers import Answerer
        from vlm_safeguard.playground.desk import Desk
        from vlm_safeguard.playground.serve import serve
    except ModuleNotFoundError as error:
        raise SafeguardError(
            f"the playground needs {error.name}: pip install 'vlm-safeguard[playground]'"
        ) from error

    if guard is None and not model.startswith("embedded"):
        raise SafeguardError(
            "name a guard with --guard; `vlm-safeguard calibrate MODEL -o guard/` makes one"
        )
    if host not in LOOPBACK:
        raise SafeguardError(
            f"{host} is not loopback: the playground shows unguarded answers and is for this "
            "machine only (`vlm-safeguard serve` is for others)"
        )
    with listen(host, port) as listener:  # before long work: a taken port shows at once
        progress = make_progress(quiet)
        artifact = Guard.from_pretrained(guard or "embedded")
        loaded = load_model(model, options, progress)
        artifact.check_model(loaded.model, loaded.processor)
        answerer = Answerer(loaded, artifact, max_new_tokens)
        anchors = anchor_map(loaded, artifact, answerer.layer, progress)
        progress.say(f"ready: {address(listener, host)} (Ctrl-C ends it)")
        serve(Desk(answerer, anchors, model, guard or "embedded"), listener)
