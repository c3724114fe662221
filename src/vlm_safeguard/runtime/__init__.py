"""A guard at work on one model."""
