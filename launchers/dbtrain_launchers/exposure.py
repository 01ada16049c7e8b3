"""What looks like a secret, and so may not travel in texts that launchers store: job records, scripts, manifests."""

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
"""Long and without structure. Used for variables only: in a command line, commits and digests look like this too."""


def looks_secret(value: str) -> bool:
    """Whether a text holds something in the form of a known kind of token, key or password."""
    return _VALUES.search(value) is not None


def secret_words(words: Sequence[str], names: bool = False) -> list[str]:
    """The words that look like secrets, cut to their beginning so that an error may show them.

    `names`: words are NAME=VALUE, and a telling name or an opaque value counts as well.
    """
    found = []
    for word in words:
        name, _, value = word.partition("=")
        if looks_secret(word) or (names and (_NAMES.search(name) or _OPAQUE.fullmatch(value))):
            found.append(name if "=" in word and len(name) < 40 else word[:6] + "...")
    return found
