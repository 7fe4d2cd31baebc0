"""Public data sets by name: downloaded, unpacked, and saved in one format."""
