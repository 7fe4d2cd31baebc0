"""One module per command: each parses its settings, calls the library and prints what happens."""
