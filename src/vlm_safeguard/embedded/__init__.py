"""The embedded VLMs: small LLaVAs that anyone can assemble without a model hub."""
