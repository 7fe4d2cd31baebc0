"""Deduplication: finds documents that are equal, or nearly equal."""
