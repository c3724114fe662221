"""Inference engines besides transformers: vLLM, and pools of Ray workers."""
