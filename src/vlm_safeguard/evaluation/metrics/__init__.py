"""Metrics beside attack success."""
