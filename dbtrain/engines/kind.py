"""What `engine.kind: auto` comes to, once the number of processes is known."""

from __future__ import annotations

from dbtrain.errors import ConfigError
from dbtrain.settings.config import PackedConfig, RunConfig
from dbtrain.settings.rules import cross_field_findings, pack_conflicts


def resolved_engine(config: RunConfig, ranks: int) -> tuple[RunConfig, str]:
    """The settings with `packed` or `zero` for `auto`, and the choice with its reason in words; "" where nothing was to
    choose.

    A LoRA in one process is a pack of one subject, or of `engine.packed.size` where that is set: the step that can be
    recorded. Several processes, whole weights, and whatever else a pack cannot do go through DeepSpeed. Raises
    ConfigError where the settings ask for both.
    """
    if config.engine.kind != "auto":
        return config, ""
    conflicts = pack_conflicts(config)
    if ranks == 1 and not conflicts:
        packed = config.replaced("engine.kind", "packed")
        if config.engine.packed == PackedConfig():
            packed = packed.replaced("engine.packed.size", 1)
        return packed, "packed: a LoRA in one process"
    why = f"{ranks} processes share each subject" if ranks > 1 else " ".join(conflicts[0])
    zero = config.replaced("engine.kind", "zero")
    for key, message in cross_field_findings(zero):
        raise ConfigError(f"{key}: {message} (engine.kind: auto is zero here: {why})")
    return zero, f"zero: {why}"
