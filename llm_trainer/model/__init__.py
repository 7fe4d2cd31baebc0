"""The network, its weights and what changes them."""
