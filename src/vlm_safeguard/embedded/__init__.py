"""The embedded VLM: a small LLaVA that anyone can assemble without a model hub."""
