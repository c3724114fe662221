"""An OpenAI-compatible server in front of a guarded model."""
