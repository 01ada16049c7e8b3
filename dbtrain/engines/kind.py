"""What `engine.kind: auto` comes to, once the number of processes and their device are known."""

from __future__ import annotations

from collections.abc import Sequence

from dbtrain.errors import ConfigError
from dbtrain.settings.config import PackedConfig, RunConfig
from dbtrain.settings.rules import cross_field_findings, pack_conflicts
from dbtrain.values import Subject


def resolved_engine(
    config: RunConfig, ranks: int, device_type: str, subjects: Sequence[Subject] = ()
) -> tuple[RunConfig, str]:
    """The settings with `packed` or `zero` for `auto`, and the choice with its reason in words; "" where nothing was to
    choose.

    A LoRA in one process on a GPU is a pack of one subject: the step that can be recorded. So it is on a CPU where the
    settings ask for what only a pack has: `engine.packed`, whose size it then is, a base in few bits, an early stop.
    Everything else goes through DeepSpeed. subjects: those of the manifest; some may have priors where the run has
    none, which no pack holds. Raises ConfigError where the settings ask for both.
    """
    if config.engine.kind != "auto":
        return config, ""
    zero, packed = (config.replaced("engine.kind", kind) for kind in ("zero", "packed"))
    lacking = cross_field_findings(zero)
    own = next((subject.id for subject in subjects if config.prior.weight == 0 and subject.prior_weight), None)
    why = f"{ranks} processes share each subject" if ranks > 1 else ""
    why = why or next((f"{key} {message.split(';')[0]}" for key, message in pack_conflicts(config)), "")
    why = why or (f"{own} has a prior_weight while prior.weight is 0" if own else "")
    if why:
        for key, message in lacking:
            raise ConfigError(f"{key}: {message} (engine.kind: auto is zero here: {why})")
        return zero, f"zero: {why}"
    if config.engine.packed != PackedConfig():
        return packed, "packed: engine.packed is set"
    if device_type != "cuda" and not lacking:
        return zero, f"zero: one process on a {device_type.upper()}, where nothing can be recorded"
    why = f"{lacking[0][0]} is for packs" if lacking else "a LoRA in one process, whose step the GPU can record"
    return packed.replaced("engine.packed.size", 1), f"packed: {why}"


def engine_here(config: RunConfig, ranks: int, subjects: Sequence[Subject] = ()) -> str:
    """Which engine would train on this machine and why, in a line."""
    import torch

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    why = resolved_engine(config, ranks, device_type, subjects)[1]
    return f"engine: auto here is {why}" if why else f"engine: {config.engine.kind}, as engine.kind says"
