"""Weights and adapters of other projects."""
