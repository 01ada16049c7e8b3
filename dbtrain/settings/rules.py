"""Rules about several settings together."""

from collections.abc import Iterator

from dbtrain.settings.config import RunConfig, ZeroConfig


def cross_field_findings(config: RunConfig) -> list[tuple[str, str]]:
    """(dotted key, message) for each setting that does not go together with others; empty when all do."""
    return [*_findings(config), *(_packed_findings(config) if config.engine.kind == "packed" else ())]


def _findings(config: RunConfig) -> Iterator[tuple[str, str]]:
    train, engine, zero, data = config.train, config.engine, config.engine.zero, config.data
    if train.warmup_steps >= train.steps and train.warmup_steps > 0:
        never = "the learning rate would never reach its peak"
        yield "train.warmup_steps", f"is {train.warmup_steps}, but train.steps is {train.steps}; {never}"
    if train.micro_batch is not None and train.batch % train.micro_batch != 0:
        yield "train.micro_batch", f"is {train.micro_batch}, which does not divide train.batch = {train.batch}"
    if zero.offload_optimizer and zero.stage == 0:
        yield "engine.zero.offload_optimizer", "needs engine.zero.stage 1, 2 or 3"
    if engine.channels_last and engine.kind == "zero":
        reason = "DeepSpeed sends weights as flat bytes, which such weights are not"
        yield "engine.channels_last", f"needs engine.kind=packed: {reason}"
    if zero.offload_parameters and zero.stage != 3:
        yield "engine.zero.offload_parameters", f"needs engine.zero.stage 3, got {zero.stage}"
    if engine.capture == "graph" and engine.kind == "zero":
        remedy = "use engine.kind=packed (a pack of one is one subject), or compile"
        yield "engine.capture", f"graph cannot record DeepSpeed's step; {remedy}"
    if engine.capture == "compile" and engine.kind == "zero" and zero.stage == 3:
        reason = "compile cannot cut blocks whose parameters ZeRO stage 3 gathers as they run"
        yield "engine.capture", f"{reason}; use engine.capture=off"
    if train.text_encoder_lr is not None and not train.text_encoder:
        yield "train.text_encoder_lr", "is set, but train.text_encoder is false, so it would have no effect"
    if "{identifier}" not in data.caption:
        yield "data.caption", f"must contain {{identifier}}, got {data.caption!r}; without it nothing names the subject"
    if "{identifier}" in data.class_caption:
        yield "data.class_caption", "must not contain {identifier}; priors show the class, not the subject"
    if config.prior.weight > 0 and config.prior.images == 0:
        remedy = "set prior.weight=0 to train without prior preservation"
        yield "prior.images", f"is 0 while prior.weight is above 0; {remedy}"
    if train.method == "lora" and not config.lora.targets:
        yield "lora.targets", "is empty; a LoRA needs at least one layer pattern"
    if train.stop_loss is not None and engine.kind != "packed":
        yield "train.stop_loss", "is set, but only engine.kind=packed looks at it"


def _packed_findings(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What a pack cannot do of what the settings ask for: (dotted key, message)."""
    train, engine, track = config.train, config.engine, config.track
    if train.method != "lora":
        yield "train.method", "must be lora: a pack shares one frozen base; use engine.kind=zero"
    if train.micro_batch not in (None, train.batch):
        remedy = "lower engine.packed.size"
        yield "train.micro_batch", f"is {train.micro_batch}, but a pack runs all {train.batch} at once; {remedy}"
    without = "is set, but engine.kind=packed trains without DeepSpeed"
    if engine.zero != ZeroConfig():
        yield "engine.zero", f"{without}; use engine.kind=zero to shard or offload"
    if engine.deepspeed is not None:
        yield "engine.deepspeed", without
    for name in ("wandb", "trackio"):
        if getattr(track, name):
            reason = "follows one run in a process, and a pack has many"
            yield f"track.{name}", f"{reason}; set it to null: log.jsonl and TensorBoard work"
