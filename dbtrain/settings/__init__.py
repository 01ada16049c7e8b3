"""The settings of a run: what there is, recipes in YAML, and their checks."""
