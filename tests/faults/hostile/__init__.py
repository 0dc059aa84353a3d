"""Hostile inputs to `besa` of our own making: what a stranger hands over, or a careless hand leaves behind.

`python tests/faults/hostile` types at each and counts by kind (part of `make faults`); `tests/faults/test_hostile.py` a
fixed subset.
"""
