"""The command line. Parts are wired together here, and only here."""
