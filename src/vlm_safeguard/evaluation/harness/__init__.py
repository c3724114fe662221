"""The evaluation harness on inspect_ai: provider, tasks, scorers, results.

Needs the extra ``eval``. inspect finds this package by its entry point, so it works from anywhere:

    inspect eval vlm_safeguard/own_malicious --model vlm-safeguard/embedded
"""
