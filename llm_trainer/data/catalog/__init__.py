"""Public datasets by name: downloaded, unpacked, and saved in one format."""
