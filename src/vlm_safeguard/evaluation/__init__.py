"""Measures models, defenses and guards."""
