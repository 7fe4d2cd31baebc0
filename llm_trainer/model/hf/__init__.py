"""Hugging Face's format of configurations and weights."""
