"""Runs the command line: ``python -m vlm_safeguard``."""

from vlm_safeguard.cli import main

main()
