"""An attached guard: sessions, forward passes, gates, steering, validation."""
