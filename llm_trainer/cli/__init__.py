"""The doors: one module a command. Here, and only here, the parts of the house are wired together."""
