"""Evaluates models, defences and guards."""
