"""Rare-token identifiers: the short, meaningless words that come to name subjects (DreamBooth, section 3.2).

A good identifier is made of 1-3 vocabulary tokens that the base model has hardly seen, each at most 3 letters and no
word. They are looked up in the model's own tokenizer: CLIP's BPE, where an id grows with merge order and so with
rarity, or T5's sentencepiece, where the paper samples ids 5000..10000. Only the interface shared by transformers'
tokenizers is used: `get_vocab`, `decode` and calling it.

Candidates are ASCII letters, so that a person can type the identifier into a prompt.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from dbtrain.errors import ConfigError
from dbtrain.values import Subject

Verdict = Literal["good", "has a meaning", "splits into common letters"]

MAX_TOKENS = 3
T5_RANGE = range(5000, 10_001)
"""Token ids that the paper samples for T5-XXL."""

_WORDS = """
    a i
    ad ah ai am an as at ax be bi by da de do dr eh el em en er ex fa fe go ha he hi ho id if in is it jr la le lo ma me
    mi mr ms my na ne no of oh ok on op or os ow ox pa pc pi pm po pt re se sh si so sr st ta te ti to tv uh uk um un up
    us va vs we wo ya ye yo
    abc abs ace act add ado ads adv age ago aha aid ail aim air ale all alt amp ana and ann ant any ape app apr apt arc
    are ark arm art ash ask asp ass ate aug aux awe axe bad bag ban bar bat bay bbc bbq bed bee beg bel ben bet bib bid
    big bin bio bit boa bob bod bog boo bot bow box boy bra bro bsc btw bub bud bug bum bun bus but buy bye cab cad cal
    cam can cap car cat caw ceo che chi cia cob cod cog col con coo cop cot cow coy cpu cry css cub cud cue cup cur cut
    dab dad dam dan das day dec del den der des dew did die dig dim din dip dna doc doe dog don dos dot dow dry dub dud
    due dug duh dun duo dvd dye ear eat ebb eco eel egg ego eke elf elk ell elm els emu end eon era esp est eta etc eva
    eve ewe eye fab fad fan far fat fax fbi feb fed fee fem fen few fez fib fig fin fir fit fix flu fly fob foe fog for
    fox fri fro fry fun fur gab gag gal gap gas gay gee gel gem geo get gig gin gnu god got gps gum gun gut guy gym had
    hag ham han has hat hay hem hen her hew hex hey hid him hip his hit hmm hob hod hoe hog hop hot how hub hue hug huh
    hum hut ian ice icy ill imp ina inc ink inn int ion ios ira ire irk isa ish iso its ivy jab jam jan jar jaw jay jen
    jet jew jig jim job joe jog jon jot joy jug jul jun jut kay keg ken key kia kid kim kin kit koi lab lad lag lap las
    law lax lay led lee leg lei len leo les let lev lid lie lil lip lit liz lob log lol los lot lou low lug luv lux lye
    mac mad mag man map mar mas mat max may med meg men met mia mic mid mil mix mob mod mom mon mop mow mph mud mug mum
    nab nag nah nan nap nay nba nbc net new nfl nhl nib nil nip nit nod non nor not nov now nun nut nyc oaf oak oar oat
    obi och oct odd ode off oft oil old omg one oni ooh opt orb ore our out ova owe owl own pac pad pal pan par pat paw
    pax pay pea pee peg pen pep per pet pew phd pic pie pig pin pip pit ply pod pop pot pow pox pre pro pry psi pub pug
    pun pup pus put que rad rag raj ram ran rap rat raw ray red ref rei rep rev rex rib rid rig rim rio rip rob roc rod
    roe ron rot row roy rub rue rug rum run rut rye sac sad sag sal sam san sap sat saw sax say sci sea sec see sen set
    sew sex she shy sic sim sin sip sir sis sit six ski sky sly sob sod sol son sop sos sow soy spa spy sri sub sue sum
    sun sup tab tad tag tan tao tap tar tat tax tea ted tee ten the thu thy tic tie til tim tin tip toe tom ton too top
    tor tot tow toy try tub tue tug tum tut two ugh uke una uni ups urn usa usb use utc van vat ver vet via vie vii vim
    vip vol von vow wad wag wan war was wax way web wed wee wet who why wig win wit wiz woe wok won woo wow wry www yak
    yam yap yaw yay yea yen yep yes yet yew yin yip you yum zac zap zed zen zig zip zit zoe zoo
"""
WORDS = frozenset(_WORDS.split())
"""Short words, names and abbreviations with a meaning, lower case."""

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
    """A tokenizer with what this module asks of it: token names by id (`rank`), and which ids count as rare."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self.names = {rank: token for token, rank in tokenizer.get_vocab().items()}
        self.before, self.after = self.encode(["a photo of", "dog"])
        self.rare = self._rare()

    def _rare(self) -> range:
        size = max(self.names) + 1
        sentencepiece = any(token.startswith("▁") for token in self.names.values())
        # The paper gives no range for CLIP: the rarer half, because early merges are letters and everyday words.
        rare = T5_RANGE if sentencepiece and size > T5_RANGE.stop else range(size // 2, size)
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

    def keeps(self, texts: Sequence[str], alone: Sequence[list[int]]) -> list[bool]:
        """For each text: inside a caption it is read as the tokens `alone`."""
        captions = self.encode([f"a photo of {text} dog" for text in texts])
        return [found == [*self.before, *ids, *self.after] for found, ids in zip(captions, alone, strict=True)]


def candidates(tokenizer: Any) -> list[Candidate]:
    """Single-token identifiers of a tokenizer, rarest first; of spellings that differ in case the rarest.

    Every one, written in a caption, is read as exactly its one token.
    """
    return _candidates(_Lexicon(tokenizer))


def _candidates(lexicon: _Lexicon) -> list[Candidate]:
    ranks = [rank for rank in lexicon.names if rank in lexicon.rare and lexicon.is_short(rank)]
    texts = [lexicon.text(rank) for rank in ranks]
    alone = lexicon.encode(texts)
    kept = zip(ranks, texts, alone, lexicon.keeps(texts, alone), strict=True)
    found = [Candidate(text, lexicon.names[rank], rank) for rank, text, ids, keeps in kept if keeps and ids == [rank]]
    rarest = {one.text.casefold(): one for one in sorted(found, key=lambda one: one.rank)}
    return sorted(rarest.values(), key=lambda one: -one.rank)


def allocate(
    tokenizer: Any,
    subjects: Sequence[Subject],
    tokens: int = 1,
    seed: int = 0,
    known: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """An identifier for each subject id, no two alike, independent of the order of `subjects`.

    A subject's identifier is a function of (seed, id) unless another subject claims the same one; then a hash of both
    decides who keeps it and the other moves on to its next choice. An explicit `Subject.identifier` is kept as it is
    (several subjects may share one on purpose) and not given to anybody else. When the identifiers of `tokens` tokens
    are used up, longer ones follow, up to three. Several tokens are written without a space where the tokenizer then
    reads the same rare pieces, else with spaces. `known` are identifiers by subject id that were given out before;
    their subjects keep them, and nobody else gets them. Raises ConfigError when a vocabulary has too few
    rare tokens.
    """
    lexicon = _Lexicon(tokenizer)
    own = {one.id: one.identifier for one in subjects}
    names = {name: text for name in own if (text := own[name] or known.get(name))}
    taken = {text.casefold() for text in (*names.values(), *known.values())}
    waiting = sorted((name for name in own if name not in names), key=lambda name: _hash(seed, name))
    pool = [one.text for one in _candidates(lexicon)] if waiting else []
    for length in range(tokens, MAX_TOKENS + 1):
        waiting = _assign(_Level(lexicon, pool, length), waiting, names, taken, seed)
    if waiting:
        raise ConfigError(f"identifiers: {len(waiting)} of {len(subjects)} subjects got none: the tokenizer has "
                          f"{len(pool)} rare tokens; give these subjects an `identifier` in the manifest")
    return {one.id: names[one.id] for one in subjects}


class _Level:
    """All identifiers of `length` rare tokens, numbered; a number's text is worked out when it is asked for."""

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
    """Gives out a level's identifiers in rounds of first, second, ... choices; the ids that are left without one.

    In rounds, so that whoever lost its first choice cannot take the first choice of somebody else.
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
    """What a tokenizer makes of a text, with a verdict on it as an identifier. Raises ConfigError if it is empty."""
    if not text.strip():
        raise ConfigError("identifier: got an empty text, want 1-3 rare tokens such as `sks`")
    lexicon = _Lexicon(tokenizer)
    ids = lexicon.encode([text])[0]
    verdict, reason = _judge(lexicon, text, ids)
    return Explanation(text, tuple(lexicon.names.get(rank, "?") for rank in ids), tuple(ids), verdict, reason)


def meanings(tokenizer: Any, texts: Iterable[str]) -> dict[str, str]:
    """Why texts have a meaning of their own, by text; without those that have none."""
    lexicon = _Lexicon(tokenizer)
    found = ((text, next(_meaningful(lexicon, text), None)) for text in dict.fromkeys(texts))
    return {text: meant for text, meant in found if meant}


def _judge(lexicon: _Lexicon, text: str, ids: list[int]) -> tuple[Verdict, str]:
    meant = next(_meaningful(lexicon, text), None)
    if meant:
        return "has a meaning", f"{meant}; the model would mix it with the subject"
    if not 1 <= len(ids) <= MAX_TOKENS:
        return "splits into common letters", f"{len(ids)} tokens, want 1 to {MAX_TOKENS}"
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
        elif len(ids) == 1 and len(lexicon.text(ids[0])) > 3:
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
