"""The command line."""

from vlm_safeguard.cli.app import main

__all__ = ["main"]
