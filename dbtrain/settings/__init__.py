"""The settings of a run: the tree of fields, recipes in YAML, and their checks."""
