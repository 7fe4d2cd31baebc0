"""Datasets by domain: texts grouped by subject, and generated exercises that need no network."""
