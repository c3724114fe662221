"""Other engines than transformers that run guarded: vLLM."""
