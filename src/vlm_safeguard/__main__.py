"""`python -m vlm_safeguard`: the command line, where its script is not on the path."""

from vlm_safeguard.cli import main

main()
