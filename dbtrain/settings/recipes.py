"""Recipes: YAML files and dotted overrides become a `RunConfig`, and a `RunConfig` becomes YAML.

All errors of a file and its overrides are reported at once. Each finding is a line: where, the value given, the values
allowed, what to do. YAML is read as version 1.2 (`1e-4` is a number, `on` is text) and without aliases.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dbtrain.errors import ConfigError
from dbtrain.settings import yaml12
from dbtrain.settings.config import RunConfig
from dbtrain.settings.rules import cross_field_findings
from dbtrain.settings.stages import read_stages

MAX_BYTES = 65_536
"""Largest settings file; the largest recipe is 2 KB, and PyYAML needs a second for this much."""


@dataclass
class _Draft:
    """A settings tree before its validation, with the origin of each key and the findings so far."""

    name: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def where(self, key: str) -> str:
        """The origin of a key, or of the nearest section around it that has one."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, self.name)


def configs_dir() -> Path:
    """The folder of shipped settings: in the package when installed, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def recipes_dir() -> Path:
    """The folder of shipped recipes."""
    return configs_dir() / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


@cache
def shipped_for(family: str) -> RunConfig | None:
    """The first shipped recipe that trains LoRAs of a family; None where none does."""
    names = (name for name in recipe_names() if name.startswith(family[:3]))
    found = (config for config in map(load, names) if config.model.family == family)
    return next((config for config in found if config.train.method == "lora"), None)


def load(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a recipe with overrides. recipe: a file, or the name of a shipped recipe; None is the defaults.

    Overrides are `a.b=value` with a YAML scalar or list as value. The last override of a key holds.
    Raises ConfigError with all findings of file and overrides.
    """
    if recipe is None:
        return loads("", "defaults", overrides)
    try:
        path = _find(str(recipe))
        text = _read(path)
    except ConfigError as error:
        raise ConfigError([*error.findings, *_override_all(_Draft(str(recipe)), overrides).findings]) from None
    return loads(text, str(path), overrides)


def loads(text: str, name: str = "text", overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a YAML text with overrides. `name` is the file's name in messages. Errors as in `load`."""
    draft = _override_all(_parse(text, name), overrides)
    config = _validate(draft)
    if draft.findings:
        raise ConfigError(sorted(draft.findings, key=lambda finding: _line_of(finding, name)))
    return config


def _line_of(finding: str, name: str) -> int:
    """The line of the file that a finding names; for an override a number above every line."""
    found = re.match(rf"{re.escape(name)}:(\d+):", finding)
    return int(found[1]) if found else MAX_BYTES


def render(config: RunConfig) -> str:
    """YAML of the whole tree. `loads` of it gives an equal config."""
    return yaml12.dump(config.model_dump(mode="json"))


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


def _find(recipe: str) -> Path:
    if "/" in recipe or "\\" in recipe or Path(recipe).suffix:
        return Path(recipe)
    names = recipe_names()
    if recipe in names:
        return recipes_dir() / f"{recipe}.yaml"
    raise ConfigError(f"recipe {_show(recipe)}: no shipped recipe has this name{_hint(recipe, names)} "
                      f"Recipes: {', '.join(names)}. A file is given with its path or extension, as in ./my.yaml")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        near = ""
        if isinstance(error, FileNotFoundError):
            near = f"{_hint(path.stem, recipe_names())} Check the path; `dbtrain config recipes` lists the shipped ones"
        raise ConfigError(f"{_show(str(path), quotes=False, width=240)}: cannot be read: {reason}{near}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes, want a settings file; is this the right path?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file so") from None


def _parse(text: str, name: str) -> _Draft:
    draft = _Draft(name)
    try:
        node = yaml12.read_node(text)
    except yaml.YAMLError as error:
        line, problem = yaml12.explain_error(error)
        draft.findings.append(f"{name}:{line}: not valid YAML: {problem}")
        return draft
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value and not node.style):
        return draft
    if not isinstance(node, yaml.MappingNode):
        draft.findings.append(f"{name}:{_line(node)}: got a {node.id}, want settings such as `train:` at the top level")
        return draft
    draft.tree = _value(node, "", draft, name)
    return draft


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _value(node: yaml.Node, key: str, draft: _Draft, name: str) -> Any:
    """The plain value of a node. Its errors are added to the draft's findings."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, key, draft, name)
    if isinstance(node, yaml.SequenceNode):
        keys = (f"{key}[{n}]" if isinstance(item, yaml.MappingNode) else key for n, item in enumerate(node.value))
        return tuple(_value(item, place, draft, name) for item, place in zip(node.value, keys))
    kind = node.tag.removeprefix(yaml12.CORE)
    try:
        return _whole(yaml12.SCALARS[kind](node.value), key)
    except KeyError:
        problem = f"the tag {node.tag} is not allowed; write a plain value"
    except ValueError:
        problem = f"got {_show(node.value)}, which is not a readable {kind}"
    draft.findings.append(f"{name}:{_line(node)}: {key or 'value'}: {problem}")
    return None


def _whole(value: Any, key: str) -> Any:
    """The value; an integer where it is a whole number such as 1e3 and the setting takes integers alone."""
    part = known_keys().get(re.sub(r"^stages\[\d+\]\.", "", key), {})
    kinds = {option.get("type") for option in part.get("anyOf", [part])}
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if whole and "integer" in kinds and "number" not in kinds else value


def _mapping(node: yaml.MappingNode, prefix: str, draft: _Draft, name: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where, word = f"{name}:{_line(key_node)}", key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            draft.findings.append(f"{where}: a {key_node.id} cannot be the name of a setting")
            continue
        key = f"{prefix}.{word}".lstrip(".")
        if key in draft.origins:
            draft.findings.append(f"{where}: {_key(key)}: given twice, first at {draft.origins[key]}; keep one")
            continue
        if "." in word and word in known_keys():
            draft.findings.append(f"{where}: {key}: dotted names are for the command line; nest it in a file, "
                                  f"as `{word.replace('.', ': {')}: ...{'}' * word.count('.')}`")
            continue
        draft.origins[key] = where
        found = len(draft.findings)
        value = _value(value_node, key, draft, name)
        if isinstance(value_node, yaml.MappingNode) or len(draft.findings) == found:
            tree[word] = value
    return tree


def _override_all(draft: _Draft, overrides: Sequence[str]) -> _Draft:
    for override in overrides:
        problem = _override(draft, override)
        if problem:
            draft.findings.append(f"override {_show(override, quotes=False)}: {problem}")
    return draft


def _override(draft: _Draft, override: str) -> str | None:
    """The problem of an override; None if its value is now in the draft."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        return f"want KEY=VALUE, as in train.steps=400{_hint(key, known_keys()) if key else ''}"
    if key not in known_keys():
        return f"unknown setting{_hint(key, known_keys())}"
    if _is_section(key):
        inside = ", ".join(known for known in known_keys() if known.startswith(f"{key}."))
        return f"{key} is a group of settings; set one of {inside}"
    try:
        node = yaml12.read_node(text)
    except yaml.YAMLError as error:
        return f"the value is not valid YAML ({yaml12.explain_error(error)[1]}); put text in quotes: {key}='\"...\"'"
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value and not node.style):
        return f"got no value, want {describe(key)}"
    if isinstance(node, yaml.MappingNode):
        return f"got a mapping, want {describe(key)}; put text with a colon or braces in quotes: {key}='\"...\"'"
    inner = _Draft("value")
    value = _value(node, key, inner, "value")
    if inner.findings:
        return inner.findings[0].partition(f"{key}: ")[2]
    _set(draft.tree, key, value)
    draft.origins[key] = f"override {_show(override, quotes=False)}"
    return None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        # A file may give a plain value for a section. It stays, so that the error names its line in the file.
        if not isinstance(tree.setdefault(section, {}), dict):
            return
        tree = tree[section]
    tree[last] = value


def _validate(draft: _Draft) -> RunConfig:
    """The config of a draft. Errors are added to the draft's findings. Defaults replace wrong values, so that the rules
    about several fields can be checked too."""
    wrong: set[str] = set()
    _put_stages(draft)
    try:
        config = RunConfig.model_validate(draft.tree, strict=True)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            key, index = _locate(problem["loc"])
            if key not in wrong:
                wrong.add(key)
                draft.findings.append(_finding(draft, key, _problem(key, index, problem)))
        config = RunConfig.model_validate(_without(draft.tree, wrong), strict=True)
    for key, message in cross_field_findings(config):
        if not any(_mentions(key, message, bad) for bad in wrong):
            draft.findings.append(_finding(draft, key, message))
    return config


def _put_stages(draft: _Draft) -> None:
    """Put checked settings in the place of each stage, which is a recipe's name with overrides, or settings."""
    given = draft.tree.get("stages")
    if isinstance(given, tuple):
        draft.tree["stages"], problems = read_stages(given, load, partial(_inner, draft))
        draft.findings += [_finding(draft, "stages", problem) for problem in problems]


def _inner(draft: _Draft, place: str, tree: dict[str, Any]) -> RunConfig:
    """The config of a stage that is given as settings; `place` is its name in the draft."""
    inner = _Draft(f"{place} of {draft.where('stages')}", tree)
    inner.origins = {key.removeprefix(f"{place}."): where for key, where in draft.origins.items()
                     if key.startswith(f"{place}.")}  # fmt: skip
    config = _validate(inner)
    draft.findings += inner.findings
    return config


def _locate(loc: tuple[int | str, ...]) -> tuple[str, str]:
    """(dotted key, `[index]`) of an error's location, without the names of union members that pydantic appends."""
    key = ""
    for position, part in enumerate(loc):
        if key and key in known_keys() and not _is_section(key):
            return key, "".join(f"[{p}]" for p in loc[position:] if isinstance(p, int))
        key = f"{key}.{part}".lstrip(".")
    return key, ""


def _finding(draft: _Draft, key: str, message: str) -> str:
    where = draft.where(key)
    return f"{where}: {message}" if where.startswith("override ") else f"{where}: {_key(key)}: {message}"


def _problem(key: str, index: str, problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown setting{_hint(key, known_keys())}"
    got = problem["input"]
    wants, advice = describe(key), ""
    if "true" in wants and str(got).lower() in ("yes", "no", "on", "off"):
        advice = "; YAML 1.2 reads that as text"
    if isinstance(got, str) and re.fullmatch(yaml12.PATTERNS["float"], got):
        advice = "; numbers go without quotes"
    if isinstance(got, int | float) and problem["type"] == "string_type":
        advice = "; put text in quotes"
    shown = "a group of settings" if isinstance(got, dict) else _show(got)
    return f"{index}{' ' if index else ''}got {shown}, want {wants}{advice}"


def _mentions(key: str, message: str, bad: str) -> bool:
    words = [key, *re.findall(r"[a-z_]+(?:\.[a-z_]+)+", message)]
    return any(word == bad or word.startswith(bad + ".") for word in words)


def _without(tree: dict[str, Any], wrong: set[str], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in wrong:
            kept[name] = _without(value, wrong, key + ".") if isinstance(value, dict) else value
    return kept


@cache
def known_keys() -> dict[str, dict[str, Any]]:
    """Every dotted key, groups included, with its part of the JSON schema."""
    whole = schema()
    return dict(_walk(whole["properties"], whole["$defs"], ""))


def _walk(properties: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in properties.items():
        if "$ref" in part:
            part = definitions[part["$ref"].rpartition("/")[2]]
        yield prefix + name, part
        yield from _walk(part.get("properties", {}), definitions, f"{prefix}{name}.")


def _is_section(key: str) -> bool:
    return "properties" in known_keys()[key]


def describe(key: str) -> str:
    """What a setting takes, in words: `a number > 0 and < 1`."""
    return _describe(known_keys()[key])


def _describe(part: dict[str, Any]) -> str:
    if "anyOf" in part:
        return " or ".join(_describe(option) for option in part["anyOf"])
    if "enum" in part or "const" in part:
        return "one of " + ", ".join(map(str, part["enum"])) if "enum" in part else str(part["const"])
    names = {"integer": "an integer", "number": "a number", "boolean": "true or false", "null": "null",
             "string": "text", "object": "a group of settings"}
    if part.get("type") == "array":
        return "a list of text"
    signs = {"exclusiveMinimum": "> ", "minimum": ">= ", "exclusiveMaximum": "< ", "maximum": "<= ",
             "multipleOf": "a multiple of ", "minLength": "length >= ", "maxLength": "length <= "}
    limits = " and ".join(f"{sign}{part[name]}" for name, sign in signs.items() if name in part)
    return f"{names[part['type']]}{', ' if limits.startswith(('a ', 'length')) else ' '}{limits}".rstrip()


def _hint(word: str, choices: Sequence[str] | dict[str, Any]) -> str:
    """`; did you mean ...?` with the nearest choices, by dotted name or its last part; else where to find them."""
    last = word.rpartition(".")[2]
    same = [choice for choice in choices if choice.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(word, choices, n=1, cutoff=0.75)
    if not near:
        ends = {choice.rpartition(".")[2]: choice for choice in choices}
        near = [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.7)]
    if not near and "." in word:
        # The word may lack the first groups of a name: zero.stage is engine.zero.stage.
        near = [choice for choice in choices if choice.endswith("." + word)]
    if not near:
        return "; `dbtrain config show` lists all settings" if isinstance(choices, dict) else "."
    return f"; did you mean {' or '.join(near[:3])}?"


def _key(key: str) -> str:
    return key if key and key.isprintable() and len(key) <= 80 else _show(key)


def _show(value: Any, quotes: bool = True, width: int = 80) -> str:
    """A value on one short line."""
    text = list(value) if isinstance(value, tuple) else value
    text = value if isinstance(value, str) and not quotes and value.isprintable() else repr(text)
    return text if len(text) <= width else text[: width - 3] + "..."
