"""YAML 1.2 as dbtrain reads and writes it: `1e-4` is a number, `on` is text, and there are no anchors or aliases.

PyYAML resolves scalars by YAML 1.1. Here the reader and the writer share one table of the 1.2 core schema, so that a
value which is written without quotes is read back as the same value.
"""

import re
from typing import Any

import yaml

MAX_DEPTH = 16
"""Deepest nesting that is read; settings need 4 levels."""

CORE = "tag:yaml.org,2002:"
"""The beginning of YAML's own tags."""
PATTERNS = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""How plain scalars look, by kind (YAML 1.2.2, section 10.3.2); anything else is text."""
_RESOLVERS = {None: [(CORE + name, re.compile(rf"(?:{pattern})\Z")) for name, pattern in PATTERNS.items()]}
SCALARS = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": lambda text: text,
}
"""The value of a scalar's text, by kind. Raises ValueError where the text is no value of the kind."""


class _Reader(yaml.SafeLoader):
    """A reader of YAML 1.2 nodes that refuses anchors, aliases and deep nesting."""

    yaml_implicit_resolvers = _RESOLVERS
    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases (&, *) are not allowed; write the value out; "
                                       "text that starts with & or * needs quotes", problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Writer(yaml.SafeDumper):
    """A writer of YAML 1.2; `_Reader` reads its output."""

    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data):
        return True

    def represent_text(self, text):
        # PyYAML writes line breaks such as U+0085 raw between single quotes, where they are folded into spaces.
        return self.represent_scalar(CORE + "str", text, style=None if text.isprintable() else '"')


_Writer.add_representer(str, _Writer.represent_text)


def read_node(text: str) -> yaml.Node | None:
    """The root node of a text's only document; None if the text has no document. Raises yaml.YAMLError."""
    reader = _Reader(text)
    try:
        return reader.get_single_node()
    finally:
        reader.dispose()


def read(text: str) -> Any:
    """The plain value of a text's only document; None if the text has no document.

    Raises yaml.YAMLError for a tag of another language, a key that is no text, and a key that stands twice.
    """
    node = read_node(text)
    return None if node is None else _plain(node)


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found = {key.value: _plain(value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        if len(found) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a key is no plain text, or stands twice", problem_mark=node.start_mark)
        return found
    try:
        return SCALARS[node.tag.removeprefix(CORE)](node.value)
    except (KeyError, ValueError) as error:
        raise yaml.MarkedYAMLError(problem=f"cannot hold {node.value!r}", problem_mark=node.start_mark) from error


def explain_error(error: yaml.YAMLError) -> tuple[int, str]:
    """Line and one-line description of a syntax error."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        text = ", ".join(part for part in (error.context, error.problem) if part)
        return (mark.line + 1 if mark else 1), text
    return 1, f"unreadable character: {getattr(error, 'reason', error)}"


def dump(value: Any) -> str:
    """YAML 1.2 of plain data (dicts, lists, scalars), in the order given."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=1000)
