"""What a guard is on disk and on the hub."""
