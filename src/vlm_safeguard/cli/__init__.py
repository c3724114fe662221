"""The command line."""

from vlm_safeguard.cli.commands import main

__all__ = ["main"]
