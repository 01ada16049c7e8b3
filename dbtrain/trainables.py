"""What trains: adapters or whole components, under the names that checkpoints and artefacts use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtrain.adapters import attach, layers, read_rows, reset_row
from dbtrain.config import RunConfig
from dbtrain.engines.engine import EngineState
from dbtrain.engines.zero import ParamGroup
from dbtrain.families import Family, Models
from dbtrain.families.pipelines import assemble
from dbtrain.publish import MODEL_FOLDER, publish_lora

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_trainable(family: Family, models: Models, config: RunConfig, subject: str) -> list[ParamGroup]:
    """The parameter groups of a fresh subject: adapters attached and started, or whole components unfrozen."""
    train = config.train
    chosen = {family.denoiser_name: models.denoiser, **(models.text_encoders if train.text_encoder else {})}
    groups = []
    for component, module in chosen.items():
        is_denoiser = component == family.denoiser_name
        if train.method == "lora":
            rank = config.lora.rank
            attach(
                module, config.lora.targets if is_denoiser else config.lora.text_targets, 1, rank, lora_alpha(config)
            )
            reset_row(module, component, 0, config.seed, subject)
        else:
            module.requires_grad_(True)
        module.train()
        if train.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
        lr = train.lr if is_denoiser else train.text_encoder_lr or train.lr
        params = {f"{component}.{name}": param for name, param in module.named_parameters() if param.requires_grad}
        groups.append(ParamGroup(params, lr))
    return groups


def lora_alpha(config: RunConfig) -> float:
    """Alpha of a run's adapters; by default the rank, which is a scale of 1."""
    return config.lora.rank if config.lora.alpha is None else config.lora.alpha


@torch.no_grad()
def final_weights(family: Family, models: Models, state: EngineState, device: str) -> None:
    """Put the trained weights (their EMA, where one was kept) into the models; nothing on ranks without the state."""
    final: dict[str, Tensor] = state.get("ema") or state["master"]
    for component, module in models.components(family.denoiser_name).items():
        for name, param in module.named_parameters():
            if f"{component}.{name}" in final:
                param.data = final[f"{component}.{name}"].to(device=device, dtype=param.dtype)


def publish_weights(
    folder: Path, family: Family, models: Models, config: RunConfig, record: dict[str, Any]
) -> list[Path]:
    """The weight files written for a finished subject: an adapter, or a diffusers folder."""
    components = models.components(family.denoiser_name)
    if config.train.method == "lora":
        provenance = {
            key: str(record[key])
            for key in ("subject", "identifier", "class", "family", "base_digest", "run", "dbtrain")
        }
        trained = {name: module for name, module in components.items() if layers(module)}
        return publish_lora(folder, read_rows(trained, 0, lora_alpha(config)), provenance, config.publish.kohya)
    dtype = DTYPES[config.publish.dtype]
    for module in components.values():
        module.to(dtype)
    assemble(family, models).save_pretrained(folder / MODEL_FOLDER, safe_serialization=True)
    for module in components.values():
        module.float()
    return sorted(path for path in (folder / MODEL_FOLDER).rglob("*") if path.is_file())
