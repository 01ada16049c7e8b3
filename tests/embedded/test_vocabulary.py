"""The captions as tokens."""

import numpy as np
from transformers import CLIPTokenizer

from dbtrain.tiny import BASE
from dbtrain_embedded.vocabulary import MAX_LENGTH, Captions


def test_identifiers_go_before_the_noun():
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    captions = Captions(tokenizer, ["a photo of a red dog on the beach"] * 4, ["dog"] * 4, share=1.0)
    rows = captions.take(np.arange(4), np.random.default_rng(0))
    dog, red = (tokenizer(word)["input_ids"][1] for word in ("dog", "red"))
    for row in rows:
        at, before = list(row).index(dog), list(row).index(red)
        assert at - before in (2, 3) and set(row[before + 1 : at]) <= set(captions.rare)
        assert len(row) == MAX_LENGTH
