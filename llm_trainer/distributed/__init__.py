"""Ranks that train together: the process group, its heartbeat, and how a model is divided."""
