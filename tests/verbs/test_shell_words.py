"""Words of commands of several shells."""

import pytest

from dbtrain.errors import ConfigError
from dbtrain.verbs.shell_words import flags_of, shell_words


def test_words_variables_and_flags():
    words = shell_words('export A="one two"\npython x.py --a=$A --b 1 2 --c\n')
    assert words == ["python", "x.py", "--a=one two", "--b", "1", "2", "--c"]
    assert flags_of(words) == {"a": "one two", "b": "1 2", "c": ""}


@pytest.mark.parametrize("text, words", [
    ("a ^\n b", ["a", "b"]), ("a `\n b", ["a", "b"]), ("a \\\r\n b", ["a", "b"]), ("a b^\n", ["a", "b^"]),
    (r"--d=C:\x\y", ["--d=C:/x/y"]), (r"--d a\b\c", ["--d", "a/b/c"]), (r"a\ b", ["a b"]),
    (r'"say \"x\""', ['say "x"'])])
def test_line_ends_and_backslashes(text, words):
    assert shell_words(text) == words


def test_an_open_quote_is_named():
    with pytest.raises(ConfigError, match="check the quotes"):
        shell_words("a 'b")
