"""Makes a guard for a model, and checks it."""
