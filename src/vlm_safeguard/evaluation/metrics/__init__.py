"""Metrics of utility and cost, and the threshold trade-off."""
