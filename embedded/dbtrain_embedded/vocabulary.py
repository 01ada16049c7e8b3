"""The tokenizer of the embedded base: a CLIP-style byte-level BPE of about 2,500 tokens.

It is trained on the world's captions, on the words of the paper's prompts, on the commonest words of Python's
own documentation, and on consonant triples as seldom as acronyms are on the web. Merge rank therefore orders
tokens by frequency, as in CLIP: the highest ids are rare tokens that are no words, where identifiers are found.
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
    """The commonest alphabetic words of Python's documentation topics, each with its number of uses."""
    from pydoc_data.topics import topics

    words = Counter(re.findall(r"[a-z]{2,12}", " ".join(topics[k] for k in sorted(topics)).lower()))
    return sorted(words.items(), key=lambda item: (-item[1], item[0]))[:count]


def rare_words(count: int = RARE_COUNT) -> list:
    """Consonant triples in a seeded order: as pronounceable as "sks", words of no language."""
    triples = ["".join(t) for t in product(CONSONANTS, repeat=3) if len(set(t)) > 1]
    order = np.random.default_rng(3).permutation(len(triples))
    return list(dict.fromkeys(["sks", *(triples[i] for i in order)]))[:count]


def corpus():
    """The training text, commonest part first."""
    for seed in range(6000):
        yield world.scene(HELD_OUT_SEED - 1 - seed)[1].lower()
    for word in PROMPT_WORDS:
        yield " ".join([word] * 60)
    for word, uses in _doc_words(700):
        yield " ".join([word] * min(50, max(8, uses // 40)))
    for rank, word in enumerate(rare_words()):
        yield " ".join([word] * (2 + (RARE_COUNT - rank) * 4 // RARE_COUNT))


def _merges() -> list:
    """The BPE's merges, commonest first."""
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
    return [tuple(m) for m in json.loads(raw.to_str())["model"]["merges"]]


def _byte_characters() -> list:
    """The 256 printable stand-ins of byte-level BPE, in GPT-2's order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown] + [chr(256 + n) for n in range(256 - len(shown))]


def build(target: Path):
    """Train the BPE and save it as a `CLIPTokenizer` folder; the tokenizer."""
    from transformers import CLIPTokenizer

    merges = _merges()
    symbols = _byte_characters()
    tokens = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(target)
    (target / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def rare_ids(tokenizer) -> list:
    """Ids of the whole-word tokens of at most three letters that no caption uses: the identifiers' stock."""
    known = {
        token for seed in range(3000) for token in tokenizer(world.scene(HELD_OUT_SEED - 1 - seed)[1])["input_ids"]
    }
    short = re.compile(r"[a-z]{2,3}</w>")
    return sorted(i for token, i in tokenizer.get_vocab().items() if short.fullmatch(token) and i not in known)


class Captions:
    """Token rows of a pool's captions, with identifiers put before the class noun now and then.

    An identifier (one or two of the rare tokens) has no visual meaning here: trained this way, a new one is neutral.
    """

    def __init__(self, tokenizer, captions: list, nouns: list, share: float = 0.06):
        self.rows = np.asarray(tokenizer(captions, padding="max_length", truncation=True)["input_ids"], np.int64)
        self.nouns = np.asarray([tokenizer(noun)["input_ids"][1] for noun in nouns])
        self.rare, self.share = np.asarray(rare_ids(tokenizer)), share
        self.empty = np.asarray(tokenizer("", padding="max_length")["input_ids"], np.int64)

    def take(self, indices, rng) -> np.ndarray:
        """Rows (len(indices), MAX_LENGTH) of token ids."""
        rows = self.rows[indices].copy()
        for spot in np.flatnonzero(rng.random(len(rows)) < self.share):
            extra = rng.choice(self.rare, size=1 + int(rng.random() < 0.3))
            row, at = rows[spot], int(np.flatnonzero(rows[spot] == self.nouns[indices[spot]])[0])
            rows[spot] = np.concatenate([row[:at], extra, row[at:]])[:MAX_LENGTH]
        return rows
