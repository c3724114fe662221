"""Serves the page on loopback."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI
from nicegui import ui

from vlm_safeguard.playground.desk import Desk
from vlm_safeguard.playground.loopback import LoopbackOnly
from vlm_safeguard.playground.page import TITLE, Page

_FAVICON = "🛡️"


def make_app(desk: Desk) -> FastAPI:
    """The application: one page, for this machine only."""
    app = FastAPI(openapi_url=None)

    def root() -> None:
        Page(desk)

    # No tunnel (on_air), no storage, no remote styles. dark=None: as the visitor's system has it.
    ui.run_with(
        app,
        root=root,
        title=TITLE,
        favicon=_FAVICON,
        dark=None,
        language="en-US",
        on_air=None,
        reconnect_timeout=30.0,  # a busy machine is slow to come back
        tailwind=False,
        show_welcome_message=False,
    )
    app.add_middleware(LoopbackOnly)
    return app


def serve(desk: Desk, listener: socket.socket) -> None:
    """Serve the page until the process is ended."""
    config = uvicorn.Config(
        make_app(desk), log_level="warning", access_log=False, server_header=False
    )
    uvicorn.Server(config).run(sockets=[listener])
