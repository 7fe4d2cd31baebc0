"""Scaling schedules: operations that change the model and the run while it trains."""
