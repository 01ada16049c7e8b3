"""The tokenizer of the embedded base: a CLIP-style byte-level BPE of 2,919 tokens.

Its training text has four parts, from the most to the least frequent: captions of the picture world, words of the
paper's prompts, the most common words of Python's documentation, and triples of consonants. Ids therefore follow
frequency, as in CLIP: the highest ids are rare tokens that are no words. Identifiers are chosen among these tokens.
"""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np

from dbtrain_embedded import world
from dbtrain_embedded.pool import HELD_OUT_SEED

MAX_LENGTH = 32
RARE_COUNT = 420
CONSONANTS = "bcdfghjklmnpqrstvwxz"

PROMPT_WORDS = """a an the of in on with at by and to from as is it its wheat field tree autumn leaves eiffel tower
floating mirror sidewalk crowded dirt road white rug blue house background red santa rainbow scarf black top hat
chef outfit firefighter police wearing yellow shirt witch angel wings glasses shiny wet cube shaped purple pink wizard
sunflowers around jungle snow beach cobblestone street green grass fabric wooden floor city mountain water desert space
painting style van gogh picture photo photograph image drawing portrait rendering cropped close bright dark clean
sleeping running swimming sitting standing small large big old new nice cute cool good my one colored colourful
stuffed animal toy plushie sunglasses bowl can candle boot vase cartoon clock sneaker teapot backpack robot puppy
kitten person man woman boat train bird horse cow panda tiger monkey view seen top bottom side back front""".split()


def _doc_words(count: int) -> list:
    """The `count` most common words of Python's documentation topics, each with its number of uses."""
    from pydoc_data.topics import topics

    words = Counter(re.findall(r"[a-z]{2,12}", " ".join(topics[topic] for topic in sorted(topics)).lower()))
    return sorted(words.items(), key=lambda item: (-item[1], item[0]))[:count]


def rare_words(count: int = RARE_COUNT) -> list:
    """`count` triples of consonants, "sks" first, the others in a fixed random order; none is a word."""
    triples = ["".join(letters) for letters in product(CONSONANTS, repeat=3) if len(set(letters)) > 1]
    order = np.random.default_rng(3).permutation(len(triples))
    return list(dict.fromkeys(["sks", *(triples[i] for i in order)]))[:count]


def corpus():
    """The lines of the training text, its most frequent part first."""
    for seed in range(6000):
        yield world.scene(HELD_OUT_SEED - 1 - seed)[1].lower()
    for word in PROMPT_WORDS:
        yield " ".join([word] * 60)
    for word, uses in _doc_words(700):
        yield " ".join([word] * min(50, max(8, uses // 40)))
    for rank, word in enumerate(rare_words()):
        yield " ".join([word] * (2 + (RARE_COUNT - rank) * 4 // RARE_COUNT))


def _merges() -> list:
    """The merges of the BPE, most frequent first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        min_frequency=2,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(corpus(), trainer)
    return [tuple(merge) for merge in json.loads(raw.to_str())["model"]["merges"]]


def _byte_characters() -> list:
    """The 256 printable characters that stand for the bytes in a byte-level BPE, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def build(target: Path):
    """Train the BPE, save it as a `CLIPTokenizer` in folder `target`, and return the tokenizer."""
    from transformers import CLIPTokenizer

    merges = _merges()
    symbols = _byte_characters()
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(merge) for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(target)
    (target / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def rare_ids(tokenizer) -> list:
    """Ids of the whole-word tokens of two or three letters that 3,000 captions do not use: identifiers are of these."""
    captions = [world.scene(HELD_OUT_SEED - 1 - seed)[1] for seed in range(3000)]
    used = {token_id for caption in captions for token_id in tokenizer(caption)["input_ids"]}
    short = re.compile(r"[a-z]{2,3}</w>")
    vocabulary = tokenizer.get_vocab().items()
    return sorted(token_id for token, token_id in vocabulary if short.fullmatch(token) and token_id not in used)


class Captions:
    """The captions of a pool as token ids; a `share` of them gets an identifier before the class noun.

    An identifier is one or two rare tokens, drawn at random, so training gives it no visual meaning. A new identifier
    is then neutral.
    """

    def __init__(self, tokenizer, captions: list, nouns: list, share: float = 0.06):
        self.rows = np.asarray(tokenizer(captions, padding="max_length", truncation=True)["input_ids"], np.int64)
        self.nouns = np.asarray([tokenizer(noun)["input_ids"][1] for noun in nouns])
        self.rare, self.share = np.asarray(rare_ids(tokenizer)), share
        self.empty = np.asarray(tokenizer("", padding="max_length")["input_ids"], np.int64)

    def take(self, indices, rng) -> np.ndarray:
        """Token ids (len(indices), MAX_LENGTH) of the captions at `indices`; `rng` draws the identifiers."""
        rows = self.rows[indices].copy()
        for number in np.flatnonzero(rng.random(len(rows)) < self.share):
            identifier = rng.choice(self.rare, size=1 + int(rng.random() < 0.3))
            row, noun = rows[number], self.nouns[indices[number]]
            place = int(np.flatnonzero(row == noun)[0])
            rows[number] = np.concatenate([row[:place], identifier, row[place:]])[:MAX_LENGTH]
        return rows
