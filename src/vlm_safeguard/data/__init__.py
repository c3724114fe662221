"""Prompts, pictures, and what reads them."""
