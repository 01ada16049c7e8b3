"""The verbs of the `dbtrain` command by theme; `cli.py` puts them together. Heavy imports stand inside the verbs."""
