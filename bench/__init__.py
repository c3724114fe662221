"""Measures what a guard costs: `make bench` writes docs/bench.md and docs/assets/bench.json."""
