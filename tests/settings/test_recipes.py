"""Settings: 50 wrong ones with every planted error reported where it is, YAML 1.2, round trips, shipped recipes."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.errors import ConfigError
from dbtrain.settings import recipes
from dbtrain.settings.config import RunConfig

EVERYTHING = """lr: 3
train:
  steps: 5
  steps: 6
  method: x
data: {flip: on, resolution: 3}
sede: 1
prior:
  images: 0
"""

# (name, file text or None, overrides, a pattern for each finding in the order of the report)
BAD = [
    ("typo", "train:\n  stesp: 5\n", [], [r":2: train.stesp: unknown setting; did you mean train.steps\?"]),
    ("flat name", "lr: 1e-4\n", [], [r":1: lr: unknown setting; did you mean train.lr\?"]),
    ("wrong section", "train:\n  rank: 4\n", [], [r":2: train.rank: unknown setting; did you mean lora.rank\?"]),
    ("short path", "zero:\n  stage: 2\n", [], [r":1: zero: unknown setting; did you mean engine.zero\?"]),
    ("section typo", "trian: {steps: 5}\n", [], [r":1: trian: unknown setting; did you mean train\?"]),
    ("no idea", "qqqqq: 5\n", [], [r":1: qqqqq: unknown setting; .*lists all settings"]),
    ("several homes", "steps: 5\n", [], [r"did you mean train.steps or prior.steps or sample.steps\?"]),
    ("negative", "train:\n  lr: -1\n", [], [r":2: train.lr: got -1, want a number > 0 and < 1$"]),
    ("zero steps", "train: {steps: 0}\n", [], [r":1: train.steps: got 0, want an integer >= 1$"]),
    ("fraction", "train: {steps: 2.5}\n", [], [r"train.steps: got 2.5, want an integer >= 1"]),
    ("float for int", "train: {steps: 5.5}\n", [], [r"train.steps: got 5.5, want an integer"]),
    ("text for number", "train: {lr: fast}\n", [], [r"train.lr: got 'fast', want a number"]),
    ("quoted number", "train: {steps: '5'}\n", [], [r"got '5', want an integer >= 1; numbers go without quotes"]),
    ("number for text", "model: {revision: 12}\n", [], [r"revision: got 12, want text or null; put text in quotes"]),
    ("yes", "data: {flip: yes}\n", [], [r"data.flip: got 'yes', want true or false; YAML 1.2 reads that as text"]),
    ("one for true", "data: {flip: 1}\n", [], [r"data.flip: got 1, want true or false"]),
    ("true for one", "train: {steps: true}\n", [], [r"train.steps: got True, want an integer"]),
    ("choice", "train: {method: lorra}\n", [], [r"train.method: got 'lorra', want one of lora, full"]),
    ("zero stage", "engine: {zero: {stage: 4}}\n", [], [r"engine.zero.stage: got 4, want one of 0, 1, 2, 3"]),
    ("union", "model: {zero_terminal_snr: 3}\n", [], [r"zero_terminal_snr: got 3, want true or false or auto$"]),
    ("multiple", "data: {resolution: 513}\n", [], [r"got 513, want an integer >= 16 and <= 4096 and a multiple of 8"]),
    ("null", "train: {steps: null}\n", [], [r"train.steps: got None, want an integer"]),
    ("infinite", "train: {clip_norm: .inf}\n", [], [r"train.clip_norm: got inf, want a number > 0 or null"]),
    ("not a number", "train: {eps: .nan}\n", [], [r"train.eps: got nan, want a number > 0"]),
    ("scalar for section", "train: 5\n", [], [r":1: train: got 5, want a group of settings"]),
    ("section for scalar", "seed: {a: 1}\n", [], [r":1: seed: got a group of settings, want an integer"]),
    ("list item", "lora:\n  targets: [a, 1]\n", [], [r":2: lora.targets: \[1\] got 1, want a list of text"]),
    ("empty text", "model: {path: ''}\n", [], [r"model.path: got '', want text, length >= 1"]),
    ("twice", "train: {steps: 5}\ntrain: {lr: 1e-4}\n", [], [r":2: train: given twice, first at .*:1; keep one"]),
    ("twice inside", "train:\n  steps: 5\n  steps: 6\n", [], [r":3: train.steps: given twice, first at .*:2"]),
    ("dotted in file", "train.lr: 1e-4\n", [], [r":1: train.lr: dotted names .* as `train: {lr: ...}`"]),
    ("alias bomb", "a: &a [1]\nb: [*a, *a]\n", [], [r":1: not valid YAML: anchors and aliases .* not allowed"]),
    ("merge key", "train: {<<: 1}\n", [], [r":1: train.<<: unknown setting"]),
    ("python tag", "seed: !!python/object/apply:os.system [ls]\n", [], [r":1: seed: .*"]),
    ("scalar tag", "seed: !secret 5\n", [], [r":1: seed: the tag !secret is not allowed"]),
    ("syntax", "train: {steps: 5\nlr: 3\n", [], [r":2: not valid YAML: .*"]),
    ("tab", "train:\n\tsteps: 5\n", [], [r":2: not valid YAML: .*"]),
    ("two documents", "seed: 1\n---\nseed: 2\n", [], [r":2: not valid YAML: .*document"]),
    ("deep", "[" * 20_000, [], [r":1: not valid YAML: nested more than 16 deep"]),
    ("list on top", "- seed: 1\n", [], [r":1: got a sequence, want settings"]),
    ("text on top", "hello\n", [], [r":1: got a scalar, want settings"]),
    ("control character", "seed: 1\x00\n", [], [r":1: not valid YAML: unreadable character"]),
    ("huge integer", "seed: " + "9" * 5000 + "\n", [], [r":1: seed: got '9+\.\.\., which is not a readable int"]),
    ("odd key", "? [a, b]\n: 1\n", [], [r":1: a sequence cannot be the name of a setting"]),
    ("empty key", "'': 1\n", [], [r":1: '': unknown setting"]),
    ("override value", None, ["train.lr=-1"], [r"^override train.lr=-1: got -1, want a number > 0 and < 1$"]),
    ("override name", None, ["train.stesp=4"], [r"^override train.stesp=4: unknown.* mean train.steps\?"]),
    ("override flat", None, ["lr=1"], [r"did you mean train.lr\?"]),
    ("override short", None, ["zero.stage=3"], [r"did you mean engine.zero.stage\?"]),
    ("no equals", None, ["train.steps"], [r"^override train.steps: want KEY=VALUE"]),
    ("no value", None, ["train.steps="], [r"got no value, want an integer >= 1"]),
    ("override group", None, ["engine.zero=3"], [r"is a group of settings; set one of engine.zero.stage, .*"]),
    ("override mapping", None, ["data.caption={subject}"], [r"got a mapping, want text.* in quotes"]),
    ("override syntax", None, ["sample.prompts=[a"], [r"not valid YAML .*; put text in quotes"]),
    ("override tag", None, ["seed=!x 1"], [r"^override seed=!x 1: the tag !x is not allowed"]),
    ("cross-field", "train:\n  batch: 4\n  micro_batch: 3\n", [], [r":3: train.micro_batch: is 3, which does not"]),
    ("cross-field mixed", "prior:\n  images: 0\n", ["engine.zero.offload_parameters=true"],
     [r":2: prior.images: is 0 while", r"^override engine.zero.offload_parameters=true: needs .*stage 3, got 0"]),
    ("no identifier", "data: {caption: a dog}\n", [], [r":1: data.caption: must contain {identifier}, {subject}, "]),
    ("all at once", EVERYTHING, ["train.lr=2", "x", "lora.rank=0", "lora.rnak=2"],
     [r":1: lr: ", r":4: train.steps: given twice", r":5: train.method: ", r":6: data.resolution: ", r":6: data.flip: ",
      r":7: sede: .*did you mean seed\?", r":9: prior.images: ", "^override train.lr=2: ", "^override x: ",
      "^override lora.rank=0: ", "^override lora.rnak=2: .*lora.rank"]),
]


def command(tmp_path, text, overrides):
    path = tmp_path / "bad.yaml"
    path.write_bytes((text or "").encode())
    return ["config", "show", str(path), *overrides]


def check_report(lines, patterns):
    # The order within one line of a file is that of the schema; everything else is in order.
    for pattern in patterns:
        assert any(re.search(pattern, line) for line in lines), (pattern, lines)
    assert len(lines) == len(patterns), lines
    assert all(len(line) < 500 and line.isprintable() for line in lines)


@pytest.mark.parametrize(("name", "text", "overrides", "patterns"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_configuration_is_reported_whole(tmp_path, name, text, overrides, patterns):
    result = CliRunner().invoke(app, command(tmp_path, text, overrides))
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    check_report([line.removeprefix("error: ") for line in lines], patterns)
    assert not result.stdout
    if text is not None:
        assert any("bad.yaml:" in line for line in lines)


@pytest.mark.parametrize("row", [BAD[0], BAD[31], BAD[-1]], ids=lambda row: row[0])
def test_a_real_process_reports_the_same(tmp_path, row):
    _, text, overrides, patterns = row
    words = [sys.executable, "-m", "dbtrain", *command(tmp_path, text, overrides)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert not done.stdout
    check_report([line.removeprefix("error: ") for line in done.stderr.splitlines()], patterns)


def test_findings_come_in_the_order_of_the_file(tmp_path):
    with pytest.raises(ConfigError) as error:
        recipes.loads("sede: 1\ntrain: {steps: 0}\nmodel: {path: ''}\n", "f", ["seed=-1"])
    assert [finding.split(": ")[0] for finding in error.value.findings] == ["f:1", "f:2", "f:3", "override seed=-1"]


def test_what_follows_from_an_error_is_no_second_error():
    with pytest.raises(ConfigError) as error:
        recipes.loads("train: {steps: -5, warmup_steps: 900}\n")  # 900 is beyond the default of 800 steps
    assert len(error.value.findings) == 1


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: path.write_bytes(b"seed: 1\nmodel: {path: \xff}\n"), r"bad.yaml:2: byte 0xff is not UTF-8"),
    (lambda path: path.write_bytes(b"# " + b"x" * recipes.MAX_BYTES), r"bad.yaml: larger than 65536 bytes"),
    (lambda path: path.mkdir(), r"bad.yaml: cannot be read: Is a directory"),
    (lambda path: None, r"bad.yaml: cannot be read: No such file"),
], ids=["bytes", "size", "folder", "missing"])
def test_files_that_cannot_be_read(tmp_path, make, message):
    make(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError) as error:
        recipes.load(tmp_path / "bad.yaml", ["lr=1"])
    assert re.search(message, error.value.findings[0])
    assert error.value.findings[1].endswith("did you mean train.lr?")


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean sd15_lora\?.*tiny_full"):
        recipes.load("sd15_lroa")


lines = st.text(min_size=1, max_size=40)
configs = st.builds(
    lambda seed, lr, eps, revision, prompts, clip, flip: RunConfig.model_validate({
        "seed": seed, "train": {"lr": lr, "eps": eps, "clip_norm": clip}, "model": {"revision": revision},
        "sample": {"prompts": prompts}, "data": {"flip": flip}}),
    st.integers(0, 2**63 - 1), st.floats(1e-300, 0.99), st.floats(1e-30, 1), st.none() | lines,
    st.lists(lines, max_size=3), st.none() | st.floats(1e-9, 1e9), st.booleans())


@settings(max_examples=100, deadline=None)
@given(configs)
def test_a_rendered_config_loads_back_equal(config):
    assert recipes.loads(recipes.render(config)) == config


def test_texts_that_look_like_other_things_survive():
    for text in ("on", "1e-4", "0o7", "~", "null", "*a", "&a", "# no", "a: b", "{x}", "'", "\x85", "\u2028", " "):
        config = recipes.loads("").model_copy(update={"model": recipes.loads("").model.model_copy(
            update={"revision": text})})
        assert recipes.loads(recipes.render(config)) == config


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_recipe_loads_and_survives_rendering(name):
    config = recipes.load(name)
    assert recipes.loads(recipes.render(config)) == config
    assert recipes.load(recipes.recipes_dir() / f"{name}.yaml") == config


def test_recipes_are_what_their_names_say():
    assert recipes.load("sdxl_full_zero3").engine.zero.stage == 3
    assert recipes.load("tiny_full").train.method == "full"


def test_overrides_replace_settings_and_the_last_one_holds():
    config = recipes.load("tiny", ["train.lr=5e-4", "train.lr=2e-4", "train.clip_norm=null", "model.revision='1'",
                                      "sample.prompts=['a {subject}', b]", "data.caption=a=b {identifier}"])
    assert config.train.lr == 2e-4
    assert config.train.clip_norm is None
    assert config.model.revision == "1"
    assert config.sample.prompts == ("a {subject}", "b")
    assert config.data.caption == "a=b {identifier}"
    assert config.prior.images == recipes.load("tiny").prior.images


def test_an_override_can_mend_a_file():
    assert recipes.loads("train: {steps: 0}", overrides=["train.steps=3"]).train.steps == 3


def test_an_empty_file_and_none_are_the_defaults():
    assert recipes.loads("# nothing\n") == recipes.load() == RunConfig()


def test_the_committed_schema_is_current():
    text = (recipes.configs_dir() / "schema.json").read_text()
    assert json.loads(text) == recipes.schema(), "run: dbtrain config schema > configs/schema.json"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.lists(st.text(max_size=20) | st.sampled_from(["seed=1", "seed=[", "a=*x"]), max_size=3))
def test_no_text_breaks_the_reader(text, overrides):
    findings = []
    try:
        recipes.loads(text, "f", overrides)
    except ConfigError as error:
        findings = error.findings
    assert all(finding.isprintable() for finding in findings)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("train.steps", "1e3", 1000), ("seed", "2e9", 2 * 10**9),
     ("data.resolution", "512.0", 512), ("train.micro_batch", "1.0", 1)],
)
def test_whole_is_whole_however_it_is_written(key, text, value):
    section, _, name = key.rpartition(".")
    config = recipes.load(None, [f"{key}={text}"])
    found = getattr(getattr(config, section) if section else config, name)
    assert found == value and type(found) is int
    with pytest.raises(ConfigError):
        recipes.load(None, [f"{key}=1.5"])


def test_numbers_and_text_stay_what_they_are():
    config = recipes.load(None, ["train.lr=1e-4", "lora.alpha=16.0", "prior.guidance=2"])
    assert (config.lora.alpha, type(config.lora.alpha)) == (16.0, float)
