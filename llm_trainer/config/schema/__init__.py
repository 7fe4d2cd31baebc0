"""The typed sections of the settings: one field per setting, with its names, unit, bounds and help."""
