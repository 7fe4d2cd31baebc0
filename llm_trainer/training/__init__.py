"""Training: the loop, the state of a run, and what both rest on."""
