"""Find what looks like a secret: launchers store their texts (job records, scripts, manifests) in the clear."""

import re
from collections.abc import Sequence

_NAMES = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSW|CREDENTIAL", re.I)
_VALUES = re.compile(
    r"""(?<![A-Za-z0-9])(
      hf_[A-Za-z0-9]{16,}                        # Hugging Face
    | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{16,}
    | sk-[A-Za-z0-9_-]{16,}                      # API keys of several vendors
    | (AKIA|ASIA)[A-Z0-9]{16}                    # AWS
    | AIza[\w-]{30,}                             # Google
    | xox[abeprs]-[\w-]{10,}                     # Slack
    | eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+          # JSON web token
    )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----
    | [a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@    # user and password in an address
    """,
    re.X,
)
_OPAQUE = re.compile(r"(?=.*[A-Za-z])(?=.*[0-9])[A-Za-z0-9_+/=-]{32,}")
"""A long value of letters and digits. Used for variables only: in command lines, commits and digests look the same."""


def secret_words(words: Sequence[str], names: bool = False) -> list[str]:
    """The names of words that look like secrets, or the first letters of words without a name, for error texts.

    `names`: words are NAME=VALUE. A name such as API_KEY, or a long value of letters and digits, counts as well.
    """
    suspects = []
    for word in words:
        name, _, value = word.partition("=")
        if _VALUES.search(word) or (names and (_NAMES.search(name) or _OPAQUE.fullmatch(value))):
            suspects.append(name if "=" in word and len(name) < 40 else word[:6] + "...")
    return suspects
