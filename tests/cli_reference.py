"""Writes ``docs/cli.md``: the ``--help`` text of every command.

python -m tests.cli_reference
"""

from __future__ import annotations

from typing import Any

import typer

from tests.paths import DOCS
from vlm_safeguard.cli.commands import app
from vlm_safeguard.utils.files import write_whole

PAGE = DOCS / "cli.md"
PROGRAM, WIDTH = "vlm-safeguard", 100
HEAD = """# Command line

Data goes to stdout, progress to stderr. `--json` prints one JSON object. A command that fails
prints `error: ...` and exits with 1.

Made by `python -m tests.cli_reference`; do not edit.
"""


def reference() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    parts = [_help(group, PROGRAM)]
    for name, command in group.commands.items():
        parts.append(f"## {name}\n\n{_help(command, f'{PROGRAM} {name}')}")
    return "\n".join([HEAD, *parts])


def _help(command: Any, name: str) -> str:
    """The help text without boxes and colours, equally wide on every terminal."""
    command.rich_markup_mode = None
    context = command.context_class(command, info_name=name, terminal_width=WIDTH)
    lines = (line.rstrip() for line in command.get_help(context).strip().splitlines())
    return "```\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    write_whole({PAGE: reference().encode()})
