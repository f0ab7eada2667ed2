"""How the small model was made: what it is shown, what it learns, and how well it does.

`python -m edged.selftest.training` makes such a model; `model/README.md` says how the one that
ships came to be, and how good it is. Nothing of it is needed to run edged.
"""
