"""Many subjects at once over one base: `pack.py` is a step of all, `loop.py` who sits where, `size.py` how many fit."""
