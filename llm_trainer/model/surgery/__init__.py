"""Growing and shrinking a model: pure functions from one model state to another, optimizer state included.

`model_state` is a model without its modules. `width_map` knows what each axis of a matrix counts and how it
is remapped. `depth`, `width`, `vocabulary` and `pruning` are the changes themselves.
"""
