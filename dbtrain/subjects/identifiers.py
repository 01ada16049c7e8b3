"""Rare-token identifiers: the short, meaningless words that come to name subjects (DreamBooth, section 3.2).

A good identifier is made of 1-3 vocabulary tokens that the base model has hardly seen. Each token has at most 3 ASCII
letters, so that a person can type it, and is no word. Rare tokens are found in the model's own tokenizer. In CLIP's
BPE an id grows with the order of merges, and so with rarity. Of T5's sentencepiece the paper samples ids 5000..10000.
Only the interface that transformers' tokenizers share is used: `get_vocab`, `decode` and calling the tokenizer.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dbtrain.errors import ConfigError
from dbtrain.values import Subject

Verdict = Literal["good", "rare, but may be a word", "has a meaning", "splits into common letters"]

MAX_TOKENS = 3
LARGE = 10_000
"""Tokens above which a vocabulary is that of a model at large; the embedded base's has 2919."""
T5_RANGE = range(5000, 10_001)
"""Token ids that the paper samples for T5-XXL."""
T5_SIZE = 40_000
"""Tokens that a vocabulary of T5's kind has at most; T5's own has 32,100."""

WORDS = frozenset(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())
"""Short English words, names and abbreviations, lower case."""

_MARKS = re.compile(r"^[▁Ġ]|</w>$")


@dataclass(frozen=True)
class Candidate:
    """A rare token that can serve as an identifier. `rank` is its vocabulary id: larger is rarer."""

    text: str
    token: str
    rank: int


@dataclass(frozen=True)
class Explanation:
    """How a model's tokenizer reads a text, and whether that makes a good identifier."""

    text: str
    tokens: tuple[str, ...]
    ranks: tuple[int, ...]
    verdict: Verdict
    reason: str

    @property
    def good(self) -> bool:
        """True if the text should be used as an identifier."""
        return self.verdict == "good"


class _Lexicon:
    """A tokenizer with its token names by id (`rank`), and the ids that count as rare."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self.names = {rank: token for token, rank in tokenizer.get_vocab().items()}
        self.before, self.after = self.encode(["a photo of", "dog"])
        self.rare = self._rare()

    def _rare(self) -> range:
        size = max(self.names) + 1
        sentencepiece = any(token.startswith("▁") for token in self.names.values())
        # The paper gives no range for CLIP: the rarer half, because early merges are letters and everyday words. The
        # same for Qwen's; and for Gemma's 256,000 pieces, which have common words where T5's 32,100 have rare ones.
        rare = T5_RANGE if sentencepiece and T5_RANGE.stop < size <= T5_SIZE else range(size // 2, size)
        # A vocabulary of a few hundred tokens may have nothing short there.
        return rare if any(self.is_short(rank) for rank in rare) else range(size)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []

    def text(self, rank: int) -> str:
        return _MARKS.sub("", self.names.get(rank, ""))

    def is_short(self, rank: int) -> bool:
        """True for a token of 1-3 letters that is no word."""
        text = self.text(rank)
        if not (1 <= len(text) <= 3 and text.isascii() and text.isalpha()) or rank in self.special:
            return False
        return text.casefold() not in WORDS and self.tokenizer.decode([rank]).strip() == text

    def is_rare_word(self, rank: int) -> bool:
        """True for a long token of the rarer half, such as CLIP's `ohwx`. In a small vocabulary no token is rare."""
        return len(self.names) > LARGE and rank in self.rare and len(self.text(rank)) > 3

    def keeps(self, texts: Sequence[str], alone: Sequence[list[int]]) -> list[bool]:
        """Whether each text is read as its tokens `alone` inside a caption too."""
        captions = self.encode([f"a photo of {text} dog" for text in texts])
        return [read == [*self.before, *ids, *self.after] for read, ids in zip(captions, alone, strict=True)]


def candidates(tokenizer: Any) -> list[Candidate]:
    """Single-token identifiers of a tokenizer, rarest first. Of spellings that differ in case only the rarest counts.

    Each of them, written in a caption, is read as exactly its one token.
    """
    return _candidates(_Lexicon(tokenizer))


def _candidates(lexicon: _Lexicon) -> list[Candidate]:
    ranks = [rank for rank in lexicon.names if rank in lexicon.rare and lexicon.is_short(rank)]
    texts = [lexicon.text(rank) for rank in ranks]
    alone = lexicon.encode(texts)
    kept = zip(ranks, texts, alone, lexicon.keeps(texts, alone), strict=True)
    single = [Candidate(text, lexicon.names[rank], rank) for rank, text, ids, keeps in kept if keeps and ids == [rank]]
    rarest = {candidate.text.casefold(): candidate for candidate in sorted(single, key=attrgetter("rank"))}
    return sorted(rarest.values(), key=attrgetter("rank"), reverse=True)


def allocate(
    tokenizer: Any,
    subjects: Sequence[Subject],
    tokens: int = 1,
    seed: int = 0,
    known: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """An identifier for each subject id, no two alike, independent of the order of `subjects`.

    A subject's choices follow from (seed, id). Where two subjects choose the same identifier, a hash decides which of
    them keeps it, and the other takes its next choice. An explicit `Subject.identifier` is kept as it is and given to
    no other subject; several subjects may ask for the same one on purpose. When the identifiers of `tokens` tokens are
    used up, longer ones follow, up to three tokens. Tokens are joined without a space where the tokenizer then reads
    the same rare pieces, else with spaces.

    known: identifiers that were given out before, by subject id. These subjects keep them, and no other gets them.
    Raises ConfigError when the vocabulary has too few rare tokens.
    """
    lexicon = _Lexicon(tokenizer)
    own = {subject.id: subject.identifier for subject in subjects}
    names = {name: text for name in own if (text := own[name] or known.get(name))}
    taken = {text.casefold() for text in (*names.values(), *known.values())}
    waiting = sorted((name for name in own if name not in names), key=lambda name: _hash(seed, name))
    pool = [candidate.text for candidate in _candidates(lexicon)] if waiting else []
    for length in range(tokens, MAX_TOKENS + 1):
        waiting = _assign(_Level(lexicon, pool, length), waiting, names, taken, seed)
    if waiting:
        what = f"identifiers: {len(waiting)} of {len(subjects)} subjects got none: the tokenizer has {len(pool)} rare"
        raise ConfigError(f"{what} tokens; give these subjects an `identifier` in the manifest")
    return {subject.id: names[subject.id] for subject in subjects}


class _Level:
    """All identifiers of `length` rare tokens, by number. A text is made only when `spell` asks for its number."""

    def __init__(self, lexicon: _Lexicon, pool: Sequence[str], length: int):
        self.lexicon, self.pool, self.length = lexicon, pool, length
        self.size = len(pool) ** length

    def spell(self, number: int) -> str | None:
        """The text with this number; None if the tokenizer does not read it as `length` rare tokens."""
        digits = [number // len(self.pool) ** place % len(self.pool) for place in range(self.length)]
        parts = [self.pool[digit] for digit in digits]
        if self.length == 1:
            return parts[0]
        forms = ["".join(parts), " ".join(parts)]
        read = self.lexicon.encode(forms)
        for form, ids, keeps in zip(forms, read, self.lexicon.keeps(forms, read), strict=True):
            same = [self.lexicon.text(rank) for rank in ids] == parts
            if keeps and same and form.casefold() not in WORDS and _weak_piece(self.lexicon, ids) is None:
                return form
        return None


def _assign(level: _Level, waiting: list[str], names: dict[str, str], taken: set[str], seed: int) -> list[str]:
    """The ids that got no identifier of a level. `names` and `taken` grow by the identifiers that were given out.

    All subjects' first choices are settled before any second choice, so that a subject which lost its first choice
    cannot take the first choice of another.
    """
    tried: set[int] = set()
    attempt = 0
    # A small level is searched to its end. In a large one only an unusual tokenizer refuses this many spellings.
    attempts = 64 + (8 * level.size if level.size <= 4096 else 0)
    while waiting and len(tried) < level.size and attempt < attempts:
        left = []
        for subject in waiting:
            number = _hash(seed, subject, level.length, attempt) % level.size
            text = None if number in tried else level.spell(number)
            tried.add(number)
            if text is None or text.casefold() in taken:
                left.append(subject)
            else:
                taken.add(text.casefold())
                names[subject] = text
        waiting, attempt = left, attempt + 1
    return waiting


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest(), "big")


def explain(tokenizer: Any, text: str) -> Explanation:
    """How a tokenizer reads a text, and a verdict on the text as an identifier. Raises ConfigError if it is empty."""
    if not text.strip():
        raise ConfigError("identifier: got an empty text, want 1-3 rare tokens such as `sks`")
    return _explain_all(tokenizer, [text])[0]


def _explain_all(tokenizer: Any, texts: Iterable[str]) -> list[Explanation]:
    lexicon, texts = _Lexicon(tokenizer), list(texts)
    explained = []
    for text, ids in zip(texts, lexicon.encode(texts), strict=True):
        tokens = tuple(lexicon.names.get(rank, "?") for rank in ids)
        explained.append(Explanation(text, tokens, tuple(ids), *_assess(lexicon, text, ids)))
    return explained


def remarks(tokenizer: Any, texts: Iterable[str]) -> dict[str, str]:
    """Why a text is not the best of identifiers, for each text that is not good."""
    explained = _explain_all(tokenizer, dict.fromkeys(texts))
    return {one.text: f"{one.text!r} {one.verdict}: {one.reason}" for one in explained if not one.good}


def same_tokens(tokenizer: Any, texts: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of different texts that the tokenizer reads as the same tokens, such as sks and SKS for CLIP's."""
    lexicon, pairs = _Lexicon(tokenizer), []
    firsts: dict[tuple[int, ...], str] = {}
    unlike = list(dict.fromkeys(texts))
    for text, ids in zip(unlike, lexicon.encode(unlike), strict=True):
        first = firsts.setdefault(tuple(ids), text)
        if first != text:
            pairs.append((first, text))
    return pairs


def _assess(lexicon: _Lexicon, text: str, ids: list[int]) -> tuple[Verdict, str]:
    meant = next(_meaningful(lexicon, text), None)
    if meant:
        return "has a meaning", f"{meant}; the model would mix it with the subject"
    if not 1 <= len(ids) <= MAX_TOKENS:
        return "splits into common letters", f"{len(ids)} tokens, want 1 to {MAX_TOKENS}"
    if len(ids) == 1 and lexicon.is_rare_word(ids[0]):
        share = 100 * ids[0] / (max(lexicon.names) + 1)
        reason = f"one token, rarer than {share:.0f} % of the vocabulary, but of more than 3 characters"
        return "rare, but may be a word", reason
    if weak := _weak_piece(lexicon, ids):
        return "splits into common letters", weak
    if not lexicon.keeps([text], [ids])[0]:
        return "splits into common letters", "inside a caption it is read as other tokens than alone"
    return "good", f"{len(ids)} rare token{'s' * (len(ids) > 1)} without a meaning"


def _meaningful(lexicon: _Lexicon, text: str) -> Iterator[str]:
    """Why words of a text have a meaning of their own."""
    words = text.split()
    for word, ids in zip(words, lexicon.encode(words), strict=True):
        if word.casefold() in WORDS:
            yield f"{word!r} is a word"
        elif len(ids) == 1 and len(lexicon.text(ids[0])) > 3 and not (lexicon.is_rare_word(ids[0]) and len(words) == 1):
            yield f"{word!r} is one token of more than 3 characters, so a word that the model knows"


def _weak_piece(lexicon: _Lexicon, ids: Iterable[int]) -> str | None:
    """What keeps some token of a text from being rare and short; None if nothing does."""
    for rank in ids:
        piece = lexicon.text(rank)
        if not piece.isalpha() or not piece.isascii() or len(piece) > 3:
            return f"{piece!r} is not a token of 1-3 letters"
        if rank in lexicon.special or rank not in lexicon.rare:
            return f"{piece!r} (rank {rank}) is common; rare ranks are {lexicon.rare.start} to {lexicon.rare.stop - 1}"
    return None
