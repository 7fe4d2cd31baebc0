"""What happens around the steps of a run: hooks, early stopping, rollback after a loss spike."""
