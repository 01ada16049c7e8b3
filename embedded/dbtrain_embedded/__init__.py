"""How the embedded base is made: its world of pictures, its tokenizer, its models and their training.

A part of the checkout, not of the wheel: dbtrain itself needs only the result, `dbtrain.tiny`.
`PYTHONPATH=embedded python -m dbtrain_embedded.recipe` runs the stages (docs/embedded-base.md).
"""
