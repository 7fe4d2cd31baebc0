"""How much memory a step needs, and how much is left."""
