"""Many subjects at once over one base: `pack.py` is a step of all, `size.py` how many fit, `seating.py` who sits in
which row, `writing.py` what ended subjects leave, `loop.py` the way from the first bank to the last record."""
