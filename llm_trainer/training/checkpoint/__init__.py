"""Saving, restoring and resuming, locally and in remote storage."""
