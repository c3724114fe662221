"""Prompts, drawings, image loading and OCR."""
