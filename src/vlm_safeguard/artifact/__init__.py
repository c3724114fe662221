"""The guard artifact: its files on disk and on the hub."""
