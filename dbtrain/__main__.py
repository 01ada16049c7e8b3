"""`python -m dbtrain`: the same as the `dbtrain` command."""

from dbtrain.cli import main

if __name__ == "__main__":
    main()
