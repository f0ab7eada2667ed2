"""Measurements: what edged costs beside the bare work, and what it carries.

    python -m tests.bench [--model DIR] [--full] [--only NAME] [--json FILE]

Every number that has a goal is a ratio or a difference between two ways of doing the same work in
the same run, one after the other in turns, so that a slow or busy machine hits both. (With frames
not in turns: two vision models of real size do not fit into one machine. See `vision`.)
"""
