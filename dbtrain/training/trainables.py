"""What trains: adapters or whole components, under the names that checkpoints and artefacts use."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbtrain.engines.engine import EngineState, ParamGroup
from dbtrain.models.adapters import attach, fresh_row, from_state, reset_row
from dbtrain.models.family import Family, Models
from dbtrain.models.pipelines import assemble
from dbtrain.results.older_programs import suit_older_programs
from dbtrain.results.publish import MODEL_FOLDER, publish_lora
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import whole_folder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def trained_components(family: Family, models: Models, config: RunConfig) -> dict[str, nn.Module]:
    """The components that train, by their names on disk."""
    return {family.denoiser: models.denoiser, **(models.text_encoders if config.train.text_encoder else {})}


def make_trainable(family: Family, models: Models, config: RunConfig, subject: str) -> list[ParamGroup]:
    """The parameter groups of a fresh subject: adapters attached and started, or whole components unfrozen."""
    groups = make_stack(family, models, config, 1)
    if config.train.method == "lora":
        for component, module in trained_components(family, models, config).items():
            reset_row(module, component, 0, config.seed, subject)
    return groups


RECOMPUTED = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""How blocks are recomputed in backward. They draw nothing at random, so no generator's state is kept for them; a CUDA
graph could not read one while it is recorded."""


def make_stack(family: Family, models: Models, config: RunConfig, subjects: int) -> list[ParamGroup]:
    """The parameter groups of so many subjects together: adapters attached, all zero, or whole components unfrozen."""
    train, groups = config.train, []
    for component, module in trained_components(family, models, config).items():
        if train.method == "lora":
            is_denoiser = component == family.denoiser
            targets = config.lora.targets if is_denoiser else config.lora.text_targets
            attach(module, targets, subjects, config.lora.rank, lora_alpha(config))
        else:
            module.requires_grad_(True)
        module.train()
        if train.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing(RECOMPUTED)
        params = {f"{component}.{name}": param for name, param in module.named_parameters() if param.requires_grad}
        groups.append(ParamGroup(params, peak_lr(family, config, component)))
    return groups


def peak_lr(family: Family, config: RunConfig, component: str) -> float:
    """The peak learning rate of a component."""
    train = config.train
    return train.lr if component == family.denoiser else train.text_encoder_lr or train.lr


def fresh_adapter(family: Family, models: Models, config: RunConfig, subject: str) -> dict[str, Tensor]:
    """A subject's adapter before training, at its own rank, by parameter name."""
    components = trained_components(family, models, config)
    rows = [fresh_row(module, name, config.lora.rank, config.seed, subject) for name, module in components.items()]
    return {name: matrix for row in rows for name, matrix in row.items()}


def lora_alpha(config: RunConfig) -> float:
    """Alpha of a run's adapters; by default the rank, which is a scale of 1."""
    return config.lora.rank if config.lora.alpha is None else config.lora.alpha


def final_state(state: EngineState) -> dict[str, Tensor]:
    """The weights to give away: the EMA, where one was kept, else the masters."""
    return state.get("ema") or state["master"]


@torch.no_grad()
def final_weights(family: Family, models: Models, state: EngineState, device: str) -> None:
    """Put the trained weights (their EMA, where one was kept) into the models; nothing on ranks without the state."""
    final = final_state(state)
    for component, module in models.components(family.denoiser).items():
        for name, param in module.named_parameters():
            if f"{component}.{name}" in final:
                param.data = final[f"{component}.{name}"].to(device=device, dtype=param.dtype)


def publish_weights(
    folder: Path, family: Family, models: Models, config: RunConfig, record: dict[str, Any], state: EngineState
) -> list[Path]:
    """The weight files written for a finished subject: the adapter in a state, or the models as a diffusers folder."""
    components = models.components(family.denoiser)
    if config.train.method == "lora":
        provenance = {
            key: str(record[key])
            for key in ("subject", "identifier", "class", "family", "base_digest", "run", "dbtrain")
        }
        weights = from_state(final_state(state), components, lora_alpha(config))
        return publish_lora(folder, weights, provenance, config.publish.kohya)
    dtype = DTYPES[config.publish.dtype]
    for module in components.values():
        module.to(dtype)
    with whole_folder(folder / MODEL_FOLDER) as temporary:
        assemble(family, models).save_pretrained(temporary, safe_serialization=True)
        suit_older_programs(temporary)
    for module in components.values():
        module.float()
    return sorted(path for path in (folder / MODEL_FOLDER).rglob("*") if path.is_file())
