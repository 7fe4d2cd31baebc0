"""From a command's settings to its parts: data, model, run, summary."""
