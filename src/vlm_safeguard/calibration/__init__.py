"""Calibrates guards and checks them."""
