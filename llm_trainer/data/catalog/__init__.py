"""Public data sets by name: fetched, unpacked, saved."""
