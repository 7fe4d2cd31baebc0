"""Growing and shrinking a model: pure functions from one form to another, optimizer state included.

`form.py` says what a model is apart from its modules, `axes.py` what each axis of a matrix counts and how it is sewn; `depth.py`,
`width.py`, `vocabulary.py` and `pruning.py` are the changes themselves.
"""
