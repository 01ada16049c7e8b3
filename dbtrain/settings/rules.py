"""Rules about several settings together."""

from dbtrain.settings.config import NAMING, RunConfig, ZeroConfig
from dbtrain.settings.stages import stage_names, upscalers


def cross_field_findings(config: RunConfig) -> list[tuple[str, str]]:
    """(dotted key, message) for each setting that does not go together with others; empty when all do."""
    train, data = config.train, config.data
    rules = [
        (
            "train.warmup_steps",
            train.warmup_steps >= train.steps and train.warmup_steps > 0,
            f"is {train.warmup_steps}, but train.steps is {train.steps}; the learning rate would never reach its peak",
        ),
        (
            "train.micro_batch",
            train.micro_batch is not None and train.batch % train.micro_batch != 0,
            f"is {train.micro_batch}, which does not divide train.batch = {train.batch}",
        ),
        (
            "train.stop_loss",
            train.stop_loss is not None and train.stop.metric != "none",
            "is set beside train.stop.metric; give one of them",
        ),
        (
            "train.stop.every",
            train.stop.metric != "none" and train.stop.every > train.steps,
            f"is {train.stop.every}, but train.steps is {train.steps}; nothing would be watched",
        ),
        (
            "train.text_encoder_lr",
            train.text_encoder_lr is not None and not train.text_encoder,
            "is set, but train.text_encoder is false, so it would have no effect",
        ),
        (
            "data.caption",
            not any(place in data.caption for place in NAMING),
            f"must contain {', '.join(NAMING)}, got {data.caption!r}; without one of these nothing names the subject",
        ),
        (
            "data.class_caption",
            "{identifier}" in data.class_caption or "[trigger]" in data.class_caption,
            "must not contain {identifier} or [trigger]; priors show the class, not the subject",
        ),
        (
            "prior.images",
            config.prior.weight > 0 and config.prior.images == 0,
            "is 0 while prior.weight is above 0; set prior.weight=0 to train without prior preservation",
        ),
        (
            "train.optimizer",
            train.optimizer != "adamw" and train.method != "full",
            "is adamw8bit, but train.method is lora, whose moments are small; use adamw",
        ),
        (
            "lora.targets",
            train.method == "lora" and not config.lora.targets,
            "is empty; a LoRA needs at least one layer pattern",
        ),
        (
            "lora.up_ratio",
            config.lora.up_ratio != 1 and train.method != "lora",
            "is set, but train.method is not lora",
        ),
        (
            "super.level_highest",
            config.super.level_highest is not None and config.super.level_highest < config.super.level,
            f"is {config.super.level_highest}, below super.level = {config.super.level}",
        ),
        ("lora.init", config.lora.init is not None and train.method != "lora", "is set, but train.method is not lora"),
    ]
    kind = config.engine.kind
    if kind == "auto":  # as far as one process goes; see `engines.kind`
        kind = "zero" if pack_conflicts(config) else "packed"
    rules += _packed_rules(config) if kind == "packed" else _zero_rules(config)
    stages = zip(stage_names(config), upscalers(config))
    of_stages = [("stages", f"{name}: {key}: {why}") for name, own in stages for key, why in cross_field_findings(own)]
    return [(key, message) for key, wrong, message in rules if wrong] + of_stages


def pack_conflicts(config: RunConfig) -> list[tuple[str, str]]:
    """(dotted key, message) for each setting, of any stage, that keeps a run from being a pack."""
    stages = (config, *upscalers(config))
    return [(key, message) for stage in stages for key, wrong, message in _packed_rules(stage) if wrong]


def _zero_rules(config: RunConfig) -> list[tuple[str, bool, str]]:
    """What DeepSpeed cannot do: (dotted key, whether the settings ask for it, message)."""
    engine, zero = config.engine, config.engine.zero
    return [
        (
            "engine.zero.offload_optimizer",
            zero.offload_optimizer and zero.stage == 0,
            "needs engine.zero.stage 1, 2 or 3",
        ),
        (
            "engine.zero.offload_parameters",
            zero.offload_parameters and zero.stage != 3,
            f"needs engine.zero.stage 3, got {zero.stage}",
        ),
        (
            "engine.channels_last",
            engine.channels_last is True,
            "needs engine.kind=packed: DeepSpeed sends weights as flat bytes, which such weights are not",
        ),
        (
            "engine.capture",
            engine.capture in ("graph", "compiled_graph"),
            f"{engine.capture} cannot record DeepSpeed's step; use engine.kind=packed, or compile",
        ),
        (
            "engine.capture",
            engine.capture == "compile" and zero.stage == 3,
            "compile cannot cut blocks whose parameters ZeRO stage 3 gathers as they run; use engine.capture=off",
        ),
        (
            "model.quantize",
            config.model.quantize != "none",
            "needs engine.kind=packed (a pack of one is one subject): DeepSpeed cannot move a base in few bits",
        ),
        (
            "train.stop_loss",
            config.train.stop_loss is not None,
            "is set, but only engine.kind=packed looks at it",
        ),
    ]


def _packed_rules(config: RunConfig) -> list[tuple[str, bool, str]]:
    """What a pack cannot do: (dotted key, whether the settings ask for it, message)."""
    train, engine, track = config.train, config.engine, config.track
    return [
        ("train.method", train.method != "lora", "must be lora: a pack shares one frozen base; use engine.kind=zero"),
        (
            "train.micro_batch",
            train.micro_batch not in (None, train.batch),
            f"is {train.micro_batch}, but a pack runs all {train.batch} at once; lower engine.packed.size",
        ),
        (
            "engine.zero",
            engine.zero != ZeroConfig(),
            "is set, but engine.kind=packed trains without DeepSpeed; use engine.kind=zero to shard or offload",
        ),
        (
            "data.buckets",
            config.data.buckets,
            "is on, but all subjects of a pack go through the model in one shape; use engine.kind=zero, or squares",
        ),
        ("engine.deepspeed", engine.deepspeed is not None, "is set, but engine.kind=packed trains without DeepSpeed"),
        (
            "track.wandb" if track.wandb else "track.trackio",
            bool(track.wandb or track.trackio),
            "follows one run in a process, and a pack has many; set it to null: log.jsonl and TensorBoard work",
        ),
    ]
