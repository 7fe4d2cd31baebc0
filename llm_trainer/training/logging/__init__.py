"""Metrics, progress, throughput, system statistics."""
