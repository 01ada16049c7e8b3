"""Identifiers against two real tokenizers, a CLIP-style BPE and a T5-style Unigram, trained here on the same text."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dbtrain.errors import ConfigError
from dbtrain.subjects import identifiers
from dbtrain.values import Subject

transformers = pytest.importorskip("transformers")

NOUNS = ["dog", "cat", "teapot", "robot", "photo", "painting", "unique", "jungle", "beach", "the", "and", "with"]


def corpus():
    """Everyday words often, random syllables seldom: so that the vocabulary has common words and rare fragments."""
    draw = random.Random(0)
    rare = ["".join(draw.choices("bcdfghjklmnpqrstvwxyz", k=draw.choice((2, 3)))) for _ in range(400)]
    for _ in range(300):
        yield "a photo of a " + " ".join(draw.choices(NOUNS, k=6))
    for word in rare:
        yield from [f"a {word} dog"] * draw.randint(2, 5)


def clip_tokenizer():
    """A BPE of CLIP's kind: lower case, `</w>` at word ends, ids in merge order behind the 512 byte tokens."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=900, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges)


def t5_tokenizer():
    """A sentencepiece Unigram with `▁` at word starts, pieces by falling score as in T5's vocabulary."""
    counts = Counter(word for line in corpus() for word in line.split())
    letters = [*"▁abcdefghijklmnopqrstuvwxyz0123456789", *(f"▁{letter}" for letter in "bcdefghjklmnop")]
    words = [f"▁{word}" for word, count in counts.most_common()]
    pieces = dict.fromkeys([*words[:20], *letters, *words[20:]])
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -50.0)]
    vocab += [(piece, -20.0 if piece in letters else -3.0 - 0.01 * rank) for rank, piece in enumerate(pieces)]
    model = Tokenizer(models.Unigram(vocab, unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


TOKENIZERS = {"clip": clip_tokenizer, "t5": t5_tokenizer}
_made = {}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return get(request.param)


def get(name):
    if name not in _made:
        _made[name] = TOKENIZERS[name]()
    return _made[name]


def subject(name, identifier=None):
    return Subject(name, "dog", (Path("a.png"),), identifier=identifier)


def ids_in_caption(tokenizer, text):
    """Ids that a caption has more with the identifier than its two ends have: an independent reading."""
    whole = tokenizer(f"a photo of {text} dog", add_special_tokens=False)["input_ids"]
    before = tokenizer("a photo of", add_special_tokens=False)["input_ids"]
    after = tokenizer("dog", add_special_tokens=False)["input_ids"]
    assert whole[:len(before)] == before
    assert whole[-len(after):] == after
    return whole[len(before):-len(after)]


def test_candidates_are_short_rare_and_one_token_in_a_caption(tokenizer):
    found = identifiers.candidates(tokenizer)
    assert len(found) > 50
    assert [one.rank for one in found] == sorted((one.rank for one in found), reverse=True)
    assert len({one.text.casefold() for one in found}) == len(found)
    for one in found:
        assert 1 <= len(one.text) <= 3
        assert one.text.isalpha()
        assert one.text.lower() not in {"a", "the", "dog", "of"}
        assert one.rank >= len(tokenizer.get_vocab()) // 2
        assert ids_in_caption(tokenizer, one.text) == [one.rank]
        assert tokenizer.convert_ids_to_tokens(one.rank) == one.token


def test_words_of_the_vocabulary_are_no_candidates(tokenizer):
    texts = {one.text for one in identifiers.candidates(tokenizer)}
    assert not texts & {"dog", "cat", "the", "and", "a", "of"}


class T5Sized:
    """A vocabulary of 12,000 three-letter pieces: large enough for the paper's range of ids."""

    all_special_ids = ()

    def __init__(self):
        letters = "bcdfghjklmnpqrstvwxyzaeiou"
        self.words = [a + b + c for a in letters for b in letters for c in letters][:12_000]
        self.vocab = {"▁" + word: rank for rank, word in enumerate(self.words)}

    def get_vocab(self):
        return self.vocab

    def decode(self, ids):
        return " ".join(self.words[rank] for rank in ids)

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[self.vocab.get("▁" + word, 0) for word in text.split()] for text in texts]}


def test_a_large_sentencepiece_vocabulary_uses_the_papers_range():
    ranks = [one.rank for one in identifiers.candidates(T5Sized())]
    assert min(ranks) >= 5000
    assert max(ranks) <= 10_000
    assert len(ranks) > 4500


def test_allocation_is_reproducible_and_independent_of_order(tokenizer):
    subjects = [subject(f"s{i}") for i in range(40)]
    first = identifiers.allocate(tokenizer, subjects, seed=3)
    assert len({name.casefold() for name in first.values()}) == 40
    assert list(first) == [one.id for one in subjects]
    assert identifiers.allocate(tokenizer, subjects[::-1], seed=3) == first
    assert identifiers.allocate(tokenizer, subjects, seed=4) != first


def test_newcomers_change_nothing_but_what_they_claim_too(tokenizer):
    old = [subject(f"s{i}") for i in range(20)]
    alone = {one.id: identifiers.allocate(tokenizer, [one])[one.id] for one in old}
    before, after = identifiers.allocate(tokenizer, old), identifiers.allocate(tokenizer, [*old, subject("new")])
    assert sum(before[one.id] == alone[one.id] for one in old) >= 12  # of 50 slots; about 3 lose their first choice
    changed = [one.id for one in old if before[one.id] != after[one.id]]
    assert len(changed) <= 3
    assert all(after["new"] == before[name] for name in changed[:1])


def test_explicit_identifiers_are_kept_and_reserved(tokenizer):
    wanted = identifiers.allocate(tokenizer, [subject("b")])["b"]
    both = identifiers.allocate(tokenizer, [subject("b"), subject("a", wanted.upper()), subject("c", "my toy")])
    assert both["a"] == wanted.upper()
    assert both["c"] == "my toy"
    assert both["b"].casefold() != wanted.casefold()


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_every_allocated_identifier_is_good_and_has_its_tokens(tokenizer, tokens):
    for text in identifiers.allocate(tokenizer, [subject(f"s{i}") for i in range(10)], tokens=tokens).values():
        explained = identifiers.explain(tokenizer, text)
        assert explained.good, explained
        assert len(explained.tokens) == tokens == len(ids_in_caption(tokenizer, text))


def test_longer_identifiers_follow_when_single_tokens_run_out(tokenizer):
    singles = len(identifiers.candidates(tokenizer))
    names = identifiers.allocate(tokenizer, [subject(f"s{i}") for i in range(singles + 30)])
    lengths = [len(identifiers.explain(tokenizer, text).tokens) for text in names.values()]
    assert lengths.count(1) == singles
    assert lengths.count(2) == 30
    assert len({text.casefold() for text in names.values()}) == singles + 30


def test_a_tokenizer_without_rare_tokens_is_an_error_with_advice():
    class Plain(T5Sized):
        def __init__(self):
            self.words = ["photo", "dog", "the", "of", "a"]
            self.vocab = {"▁" + word: rank for rank, word in enumerate(self.words)}

    with pytest.raises(ConfigError, match=r"2 of 2 subjects got none.*manifest"):
        identifiers.allocate(Plain(), [subject("a"), subject("b")])


def test_a_tokenizer_that_merges_everything_is_given_up_on_soon():
    class Merging(T5Sized):
        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [[self.vocab.get("▁" + word, 0) for word in text.split()] if len(text) < 4
                                  or text.endswith((" of", " dog")) else [0] for text in texts]}

    with pytest.raises(ConfigError, match="1 of 1 subjects got none"):
        identifiers.allocate(Merging(), [subject("a")], tokens=2)


@pytest.mark.parametrize(("text", "verdict"), [
    ("unique", "has a meaning"), ("dog", "has a meaning"), ("the", "has a meaning"),
    ("xxy5syt00", "splits into common letters"), ("e", "splits into common letters"),
    ("!?", "splits into common letters")])
def test_bad_identifiers_are_explained(tokenizer, text, verdict):
    explained = identifiers.explain(tokenizer, text)
    assert explained.verdict == verdict
    assert not explained.good
    assert explained.reason
    assert len(explained.tokens) == len(explained.ranks)


class ClipSized(T5Sized):
    """A vocabulary of CLIP's size and marks, in which four long tokens have the ranks that they have in CLIP's."""

    LONG = {"ohwx": 47993, "olis": 44611, "gabi": 41877, "dream": 1370}

    def __init__(self):
        self.by_word = {"a": 0, "photo": 1, "of": 2, "dog": 3, "zwx": 49000, **self.LONG}
        self.words = [f"q{number}" for number in range(49408)]
        for word, rank in self.by_word.items():
            self.words[rank] = word
        self.vocab = {f"{word}</w>": rank for rank, word in enumerate(self.words)}

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[self.by_word.get(word.lower(), 9) for word in text.split()] for text in texts]}


@pytest.mark.parametrize("text", ["ohwx", "olis", "gabi", "OHWX"])
def test_long_tokens_are_judged_by_their_rarity(text):
    explained = identifiers.explain(ClipSized(), text)
    assert explained.verdict == "rare, but may be a word" and "% of the vocabulary" in explained.reason
    assert identifiers.explain(ClipSized(), "dream").verdict == "has a meaning"


def test_texts_of_the_same_tokens_are_paired(tokenizer):
    rare = identifiers.candidates(tokenizer)[0].text
    lowers = tokenizer(rare)["input_ids"] == tokenizer(rare.upper())["input_ids"]
    found = identifiers.same_tokens(tokenizer, [rare, "dog", rare.upper(), rare])
    assert found == ([(rare, rare.upper())] if lowers else [])


def test_an_empty_text_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match="empty"):
        identifiers.explain(tokenizer, "  ")


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), text=st.text(min_size=1, max_size=12).filter(str.strip))
def test_every_text_gets_a_verdict(name, text):
    explained = identifiers.explain(get(name), text)
    assert explained.good == (explained.verdict == "good")
    if explained.good:
        assert ids_in_caption(get(name), text) == list(explained.ranks)


def test_thousands_of_subjects_get_different_identifiers(tokenizer):
    names = identifiers.allocate(tokenizer, [subject(f"s{i}") for i in range(2_000)])
    assert len({text.casefold() for text in names.values()}) == 2_000


def test_no_model_library_is_imported():
    source = Path(identifiers.__file__).read_text()
    assert "import transformers" not in source
    assert "from transformers" not in source
