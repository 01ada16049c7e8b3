"""The DeepSpeed configuration of a run: what dbtrain decides, merged with a user's standard JSON and checked."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dbtrain.engines.engine import BatchPlan
from dbtrain.errors import ConfigError
from dbtrain.settings.config import RunConfig

OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
    "optimizer",
    "scheduler",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
"""Top-level keys that the run's configuration decides."""

THEIRS: dict[str, type | tuple[type, ...]] = {
    "zero_optimization": dict,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "prescale_gradients": bool,
    "gradient_predivide_factor": (int, float),
    "communication_data_type": str,
    "sparse_gradients": bool,
    "dump_state": bool,
    "comms_logger": dict,
    "flops_profiler": dict,
    "monitor_config": dict,
    "tensorboard": dict,
    "wandb": dict,
    "csv_monitor": dict,
    "comet": dict,
    "activation_checkpointing": dict,
    "aio": dict,
    "checkpoint": dict,
    "memory_breakdown": bool,
    "seq_parallel_communication_data_type": str,
    "data_types": dict,
    "disable_allgather": bool,
    "zero_gather_16bit_weights_on_model_save": bool,
}
"""Top-level keys that a user may set, with their types; DeepSpeed passes an unknown key silently, and fails on a wrong
type deep within."""

SWITCHED = frozenset(
    """amp autotuning compile compression_training curriculum_learning data_efficiency elasticity eigenvalue
    hybrid_engine nebula pipeline progressive_layer_drop quantize_training sparse_attention tensor_parallel
    use_node_local_storage weight_quantization""".split()
)
"""Top-level keys of DeepSpeed that change the training, and that templates often hold switched off."""
ADAM = ("Adam", "AdamW")
"""Types of optimizers in templates that are the run's own AdamW when all of their values are "auto"."""

JSON_NAMES = {dict: "an object", bool: "true or false", str: "text", int: "a whole number", (int, float): "a number"}


def deepspeed_config(
    config: RunConfig, plan: BatchPlan, zero_keys: Collection[str], on_gpu: bool = False
) -> dict[str, Any]:
    """The complete DeepSpeed configuration; raises ConfigError with every problem of the user's file at once.

    zero_keys: what this DeepSpeed knows under `zero_optimization`. on_gpu: whether what is offloaded is copied to a
    GPU, for which its memory is pinned: other memory is copied at a fraction of the speed, and the host waits.
    """
    zero = config.engine.zero
    cpu = {"device": "cpu", "pin_memory": on_gpu}
    decided: dict[str, Any] = {
        "train_batch_size": plan.batch,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed's default is 1.0, not "never"; 0 is never.
        "gradient_clipping": config.train.clip_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,
        **({"zero_allow_untested_optimizer": True} if config.train.optimizer == "adamw8bit" else {}),
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": zero.stage,
            **({"offload_optimizer": cpu} if zero.offload_optimizer else {}),
            **({"offload_param": cpu} if zero.offload_parameters else {}),
        },
    }
    if config.engine.deepspeed is None:
        return decided
    return merge_user_file(Path(config.engine.deepspeed), decided, zero_keys)


def merge_user_file(path: Path, decided: dict[str, Any], zero_keys: Collection[str]) -> dict[str, Any]:
    """A user's DeepSpeed JSON under dbtrain's decisions: "auto" is resolved; disagreement, unknown keys are errors."""
    user = _read_json(path)
    user = {key: value for key, value in user.items() if key not in SWITCHED or not _is_off(value)}
    known = [*OURS, *THEIRS]
    findings = [
        f"{path}: {key}: is switched on, and dbtrain does not use it; remove it, or set enabled to false"
        if key in SWITCHED
        else _unknown(path, key, known)
        for key in user
        if key not in known
    ]
    findings += [
        f"{path}: {key}: got {value!r}, want {JSON_NAMES[THEIRS[key]]}"
        for key, value in user.items()
        if key in THEIRS and value != "auto" and not _is_a(value, THEIRS[key])
    ]
    user_zero = user.get("zero_optimization", {})
    findings += [_unknown(path, f"zero_optimization.{key}", zero_keys) for key in user_zero if key not in zero_keys]
    for name, section, ours in (("", user, decided), ("zero_optimization.", user_zero, decided["zero_optimization"])):
        findings += [
            f"{path}: {name}{key}: got {section[key]!r}, but the run decides {ours.get(key, 'that it is off')!r}; "
            'remove the key, write "auto", or change the run\'s configuration'
            for key in section
            if _disagrees(key, section[key], ours, top=not name)
        ]
    if findings:
        raise ConfigError(findings)
    kept = {key: _without_auto(value) for key, value in user.items() if key in THEIRS and value != "auto"}
    kept_zero = _without_auto(user_zero)
    return {**kept, **decided, "zero_optimization": {**kept_zero, **decided["zero_optimization"]}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = _parsed(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.deepspeed: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"engine.deepspeed: {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"engine.deepspeed: {path} must hold a JSON object, got {type(value).__name__}")
    zero = value.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{path}: zero_optimization: got {zero!r}, want a JSON object such as {{\"stage\": 2}}")
    return value


def _parsed(text: str) -> Any:
    """The value in a JSON text; comments and trailing commas are allowed, as DeepSpeed reads its files with hjson."""
    import hjson

    try:
        return json.loads(text)
    except ValueError as error:
        value = json.loads(json.dumps(hjson.loads(text)))  # plain dicts, lists and numbers
        if not isinstance(value, dict):
            raise error  # hjson takes any text for a text without quotes
        return value


def _is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a JSON value is of a kind; to Python, true is a number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _unknown(path: Path, key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key.split(".")[-1], known, 1)
    return f"{path}: {key}: unknown DeepSpeed key" + (f"; did you mean {near[0]}?" if near else "")


def _disagrees(key: str, value: Any, ours: dict[str, Any], top: bool) -> bool:
    if key in ("zero_optimization", "steps_per_print") or value == "auto":
        return False
    if top and key in ("optimizer", "scheduler") and isinstance(value, dict):
        params = value.get("params") or {}
        kind = key == "scheduler" or value.get("type") in ADAM
        return not (kind and params and isinstance(params, dict) and all(entry == "auto" for entry in params.values()))
    if key in ("fp16", "bf16") and isinstance(value, dict):
        return value.get("enabled", False) not in (False, "auto")
    if key in ours:
        return not _agrees(value, ours[key])
    return (top and key in OURS) or (key.startswith("offload_") and value not in (None, {"device": "none"}))


def _is_off(value: Any) -> bool:
    """Whether a section is switched off; one without `enabled` is off in DeepSpeed, whatever else it says."""
    return value in (None, False) or (isinstance(value, dict) and value.get("enabled", False) in (False, "auto"))


def _agrees(value: Any, ours: Any) -> bool:
    if isinstance(ours, dict) and isinstance(value, dict):
        return value.get("device") == ours.get("device")
    return value == ours


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(entry) for key, entry in value.items() if entry != "auto"}
    return value
