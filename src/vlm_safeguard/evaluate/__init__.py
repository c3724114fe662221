"""Generating responses, judging them, and the statistics of rates."""
