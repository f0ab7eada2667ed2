"""How the small model was made: what it is shown, what it learns, and how well it does.

`python -m edged.selftest.training` makes the model's folder anew; `model/README.md` has what comes
out. Nothing of it is needed to run or to test edged.
"""
