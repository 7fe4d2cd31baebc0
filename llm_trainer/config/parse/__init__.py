"""From a command line and files to validated settings."""
