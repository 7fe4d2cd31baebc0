"""Cleaning of documents: text normalization, and filters that reject documents by name."""
