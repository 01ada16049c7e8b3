"""A user's DeepSpeed JSON: what is unknown, unresolved or at odds with the run is named, all of it at once."""

import json

import pytest

from dbtrain.engines.deepspeed_json import deepspeed_config
from dbtrain.engines.engine import plan_batches
from dbtrain.engines.zero import _accepted_config, zero_keys
from dbtrain.errors import ConfigError
from dbtrain.settings.config import RunConfig, TrainConfig
from dbtrain.settings.recipes import configs_dir, load

pytest.importorskip("deepspeed")
KNOWN = zero_keys()


def resolve(path, stage=2, **train):
    engine = {"deepspeed": None if path is None else str(path), "zero": {"stage": stage}}
    config = RunConfig(train=TrainConfig(batch=4, micro_batch=2, **train), engine=engine)
    return deepspeed_config(config, plan_batches(4, 2, 1), KNOWN)


@pytest.fixture
def given(tmp_path):
    def write(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def findings(path, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(path, **options)
    assert all(str(path) in finding for finding in caught.value.findings)
    return caught.value.findings


def test_every_problem_is_named_with_a_hint_in_one_pass(given):
    path = given(
        {
            "gradient_cliping": 1.0,
            "train_batch_size": 8,
            "zero_optimization": {"stage": 3, "reduce_bucket_sise": 5, "overlap_comm": True},
            "optimizer": {"type": "Adam"},
        }
    )
    lines = findings(path)
    for words in (
        "gradient_cliping: unknown DeepSpeed key; did you mean gradient_clipping?",
        "zero_optimization.reduce_bucket_sise: unknown DeepSpeed key; did you mean reduce_bucket_size?",
        "train_batch_size: got 8, but the run decides 4",
        "zero_optimization.stage: got 3, but the run decides 2",
        "optimizer: got {'type': 'Adam'}, but the run decides",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert len(lines) == 5


def test_auto_is_resolved_everywhere(given):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": True, "offload_optimizer": "auto"}
    path = given({**dict.fromkeys(names, "auto"), "bf16": {"enabled": "auto"}, "zero_optimization": zero})
    got = resolve(path)
    assert [got[name] for name in names] == [4, 2, 2, 1.0]
    assert got["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert '"auto"' not in json.dumps(got)


def test_what_agrees_is_accepted_and_what_is_theirs_is_kept(given):
    path = given(
        {
            "train_batch_size": 4,
            "gradient_clipping": 1.0,
            "wall_clock_breakdown": True,
            "activation_checkpointing": {"cpu_checkpointing": "auto", "profile": True},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        }
    )
    got = resolve(path)
    assert got["wall_clock_breakdown"] is True
    assert got["activation_checkpointing"] == {"profile": True}
    assert got["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}


@pytest.mark.parametrize("given_path", [None, "file"])
def test_deepspeeds_silent_clipping_at_one_never_holds(given, given_path):
    path = given({"zero_optimization": {}}) if given_path else None
    assert resolve(path, clip_norm=None)["gradient_clipping"] == 0.0
    assert resolve(path, clip_norm=0.5)["gradient_clipping"] == 0.5


def test_never_clipping_disagrees_with_a_file_that_clips(given):
    (line,) = findings(given({"gradient_clipping": 1.0}), clip_norm=None)
    assert "gradient_clipping: got 1.0, but the run decides 0.0" in line


@pytest.mark.parametrize("section", [{"fp16": {"enabled": True}}, {"bf16": {"enabled": True}}])
def test_precision_is_the_runs(given, section):
    (line,) = findings(given(section))
    assert next(iter(section)) in line
    off = {name: {"enabled": False} for name in section}
    assert not section.keys() & resolve(given(off)).keys()


def test_offload_must_be_the_runs_too(given):
    (line,) = findings(given({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    assert "zero_optimization.offload_optimizer" in line
    assert resolve(given({"zero_optimization": {"offload_optimizer": {"device": "none"}}}))


@pytest.mark.parametrize(
    "content", ['{"a": ', "[1, 2]", '"text"', '{"zero_optimization": 2}', '{"zero_optimization": null}']
)
def test_what_is_no_json_object_is_said_so(given, content):
    with pytest.raises(ConfigError, match=r"ds\.json"):
        resolve(given(content))


def test_bytes_that_are_no_text_are_said_so(tmp_path):
    (tmp_path / "ds.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="ds.json"):
        resolve(tmp_path / "ds.json")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match=f"engine.deepspeed: cannot read {path}"):
            resolve(path)


@pytest.mark.parametrize(("file", "recipe"), [("zero2.json", "sd15_full_zero2"), ("zero3.json", "sdxl_full_zero3")])
def test_shipped_files_fit_their_recipes(file, recipe):
    path = configs_dir() / "deepspeed" / file
    config = load(recipe, [f"engine.deepspeed={path}", "engine.zero.offload_optimizer=false"])
    for ranks in (1, 2):
        got = deepspeed_config(config, plan_batches(config.train.batch, None, ranks), KNOWN)
        assert got["zero_optimization"]["stage"] == config.engine.zero.stage
        assert '"auto"' not in json.dumps(got)
    offloaded = load(recipe, [f"engine.deepspeed={path}", "engine.zero.offload_optimizer=true"])
    got = deepspeed_config(offloaded, plan_batches(config.train.batch, None, 1), KNOWN)
    assert got["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    got = deepspeed_config(offloaded, plan_batches(config.train.batch, None, 1), KNOWN, on_gpu=True)
    assert got["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_every_shipped_file_is_tried():
    assert {path.name for path in (configs_dir() / "deepspeed").glob("*.json")} == {"zero2.json", "zero3.json"}


WRONG_TYPES = {
    "steps_per_print": "x",
    "wall_clock_breakdown": "yes",
    "flops_profiler": 3,
    "comms_logger": [],
    "tensorboard": 1,
    "communication_data_type": 7,
    "gradient_predivide_factor": True,
    "prescale_gradients": 1,
    "memory_breakdown": [],
    "data_types": None,
}


def test_every_wrong_type_is_named_with_the_wanted_one(given):
    found = findings(given(WRONG_TYPES))
    assert len(found) == len(WRONG_TYPES)
    for finding, (key, value) in zip(found, WRONG_TYPES.items()):
        assert f"{key}: got {value!r}, want " in finding


@pytest.mark.parametrize(
    "zero", [{"reduce_bucket_size": "many"}, {"overlap_comm": [1]}, {"sub_group_size": None, "stage": "auto"}]
)
def test_what_deepspeed_itself_refuses_is_a_settings_error(given, world, zero):
    path = given({"zero_optimization": zero})
    config = RunConfig(train=TrainConfig(batch=4), engine={"deepspeed": str(path), "zero": {"stage": 2}})
    with pytest.raises(ConfigError, match=f"DeepSpeed refuses it: .*{next(iter(zero))}"):
        _accepted_config(config, plan_batches(4, 2, 1))


AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_the_usual_template_of_autos_is_the_runs_own(given, kind):
    path = given({"optimizer": {"type": kind, "params": AUTO}, "zero_optimization": {"stage": 2},
                  "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
                  "fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"}})  # fmt: skip
    assert resolve(path) == resolve(given({"zero_optimization": {"stage": 2}}))


@pytest.mark.parametrize("section", [
    {"optimizer": {"type": "AdamW", "params": {**AUTO, "lr": 1e-3}}}, {"optimizer": {"type": "Lamb", "params": AUTO}},
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}])  # fmt: skip
def test_a_template_with_values_of_its_own_disagrees(given, section):
    (line,) = findings(given(section))
    assert next(iter(section)) in line and "the run decides" in line


COMMENTED = {
    "line comments": '{\n // stage two\n "zero_optimization": {"stage": 2} # why\n}',
    "trailing commas": '{"zero_optimization": {"stage": 2,},}',
    "a block comment": '{/* two\n lines */ "zero_optimization": {"stage": 2}}',
}


@pytest.mark.parametrize("case", COMMENTED)
def test_json_with_comments_is_read_as_deepspeed_reads_it(given, case):
    assert resolve(given(COMMENTED[case])) == resolve(given({"zero_optimization": {"stage": 2}}))


OFF = {"amp": {"enabled": False, "opt_level": "auto"}, "elasticity": {"enabled": False}, "autotuning": {},
       "curriculum_learning": {"enabled": "auto"}, "data_efficiency": None}  # fmt: skip


def test_sections_that_are_switched_off_say_nothing(given):
    plain = resolve(given({"zero_optimization": {"stage": 2}}))
    assert resolve(given({**OFF, "zero_optimization": {"stage": 2}})) == plain


@pytest.mark.parametrize("name", OFF)
def test_and_switched_on_they_are_refused(given, name):
    (line,) = findings(given({name: {"enabled": True}}))
    assert f"{name}: is switched on, and dbtrain does not use it" in line
