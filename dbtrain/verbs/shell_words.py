"""The words of a command as its own shell reads them: continued lines, variables, quotes, paths of Windows."""

import re
import shlex

from dbtrain.errors import ConfigError


def shell_words(text: str) -> list[str]:
    """Shell words of a command or a small script: continued lines joined, `export A=b` lines applied."""
    variables: dict[str, str] = {}
    words: list[str] = []
    text = text.replace("\r\n", "\n").lstrip("\ufeff")
    for line in re.sub(r"(?<!\S)[\\^`][^\S\n]*\n|\\[^\S\n]*\n", " ", text).splitlines():
        try:
            parts = shlex.split(_keep_windows_paths(line), comments=True)
        except ValueError as error:
            raise ConfigError(f"migrate: {line.strip()[:60]!r}: {error}; check the quotes") from None
        parts = [re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: variables.get(m[1] or m[2], m[0]), part) for part in parts]
        while parts and (parts[0] in ("export", "!") or re.match(r"\w+=", parts[0])):
            name, equals, value = parts.pop(0).partition("=")
            if equals:
                variables[name] = value
        words += parts
    return words


def _keep_windows_paths(line: str) -> str:
    """A line whose backslashes are separators of Windows paths, with slashes in their place."""

    def slashes(found: re.Match[str]) -> str:
        return found[0].replace("\\", "/")

    drive, relative = r"[A-Za-z]:\\[^\s\"']*", r"\.{1,2}\\[^\s\"']+|\\\\[\w.-]+\\[^\s\"']+"
    quoted = r"(?<=[=\s])\"(?:[A-Za-z]:|\.{1,2}|\\)\\[^\"]*\""
    plain = r"(?<=[=\s])[\w.-]+(?:\\[\w.-]+)+(?=\s|$)"
    return re.sub(rf"{quoted}|(?<=[=\s\"']){drive}|(?<=[=\s\"'])(?:{relative})|{plain}", slashes, line)


def flags_of(words: list[str]) -> dict[str, str]:
    """Flags with their values; the empty text for a switch, several values joined by a space."""
    flags: dict[str, str] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = value
        elif name:
            flags[name] = f"{flags[name]} {word}".strip()
    return flags
