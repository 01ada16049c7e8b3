"""What trains: adapters or whole components, under the names that checkpoints and artefacts use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbtrain.engines.engine import EngineState, ParamGroup
from dbtrain.engines.loss_scale import DTYPES
from dbtrain.errors import ConfigError, DataError
from dbtrain.models.adapters import (
    attach,
    fresh_row,
    from_state,
    layers,
    matching_layers,
    refuse_unstackable,
    renamed,
    reset_row,
)  # fmt: skip
from dbtrain.models.family import Family, Models, recompute
from dbtrain.models.pipelines import assemble
from dbtrain.results.older_programs import suit_older_programs
from dbtrain.results.publish import MODEL_FOLDER, adapter_file, publish_lora, read_lora
from dbtrain.settings import recipes
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import file_digest, whole_folder


def trained_components(family: Family, models: Models, config: RunConfig) -> dict[str, nn.Module]:
    """The components that train, by their names on disk."""
    return {family.denoiser: models.denoiser, **(models.text_encoders if config.train.text_encoder else {})}


def make_trainable(family: Family, models: Models, config: RunConfig, subject: str) -> list[ParamGroup]:
    """The parameter groups of a fresh subject: adapters attached and started, or whole components unfrozen."""
    groups = make_stack(family, models, config, 1)
    if config.train.method == "lora":
        for component, module in trained_components(family, models, config).items():
            reset_row(module, component, 0, config.seed, subject)
        if config.lora.init:
            _start_row(family, models, config)
    return groups


@torch.no_grad()
def _start_row(family: Family, models: Models, config: RunConfig) -> None:
    """Put the adapter of `lora.init` into the only row of the stacks."""
    given = initial_matrices(family, models, config)
    for component, module in trained_components(family, models, config).items():
        for path, layer in layers(module):
            if (name := f"{component}.{path}") in given:
                down, up = given[name]
                layer.down_NRD[0, : len(down)] = down.to(layer.down_NRD)
                layer.up_NDR[0, :, : len(down)] = up.to(layer.up_NDR)


def initial_matrices(family: Family, models: Models, config: RunConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [r, in], B [out, r]) by component and path of the adapter in `lora.init`, r being at most `lora.rank`.

    B is scaled so that the adapter does under this run's alpha and rank what it did under its own. Layers that it
    lacks, and ranks above its own, start afresh. Raises DataError where it does not fit.
    """
    path = Path(str(config.lora.init))
    weights = renamed(models.components(family.denoiser), read_lora(path)[0])
    if weights.rank > config.lora.rank:
        raise DataError(f"lora.init: {path} has rank {weights.rank}, lora.rank is {config.lora.rank}; raise it")
    trained = trained_components(family, models, config)
    targets = {f"{name}.{at}": layer for name, module in trained.items() for at, layer in layers(module)}
    factor = weights.scale / (lora_alpha(config) / config.lora.rank)
    given = {f"{name}.{at}": (down, up * factor) for name, matrices in weights.matrices.items()
             for at, (down, up) in matrices.items()}  # fmt: skip
    if strange := sorted(given.keys() - targets.keys()):
        raise DataError(
            f"lora.init: {path} has a matrix for {strange[0]}, which this run does not train; set lora.targets "
            "(and train.text_encoder=true for text encoders) as it was trained"
        )
    for name, (down, up) in given.items():
        got, want = (down.shape[1], up.shape[0]), (targets[name].down_NRD.shape[2], targets[name].up_NDR.shape[1])
        if got != want:
            raise DataError(f"lora.init: {path}: {name} is {got} wide, want {want}; give an adapter of this base")
    return given


def initial_digest(config: RunConfig) -> str:
    """SHA-256 of the adapter in `lora.init`; DataError if there is none."""
    path = Path(str(config.lora.init))
    file = adapter_file(path)
    if not file.is_file():
        raise DataError(f"lora.init: {file} is no file; give a finished subject's folder, or an adapter's file")
    return file_digest(file)


RECOMPUTED = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""How blocks are recomputed in backward. They draw no random numbers, so no generator's state is kept: that cannot be
read while a CUDA graph is recorded."""


def make_stack(family: Family, models: Models, config: RunConfig, subjects: int) -> list[ParamGroup]:
    """The parameter groups of so many subjects together. Adapters are attached with all weights 0; without adapters,
    whole components are unfrozen."""
    train, groups = config.train, []
    for component, module in trained_components(family, models, config).items():
        is_denoiser = component == family.denoiser
        if train.method == "lora":
            targets = config.lora.targets if is_denoiser else config.lora.text_targets
            if is_denoiser and not matching_layers(module, targets):
                _refuse_targets(family, module, targets)
            attach(module, targets, subjects, config.lora.rank, lora_alpha(config))
            if subjects > 1 and is_denoiser:
                refuse_unstackable(module, family.unstackable)
        else:
            module.requires_grad_(True)
        module.train()
        if train.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            (family.recompute if is_denoiser else recompute)(module, RECOMPUTED)
        params = {f"{component}.{name}": param for name, param in module.named_parameters() if param.requires_grad}
        parts = [params] if config.lora.up_ratio == 1 else [_matrices(params, kind) for kind in ("down_NRD", "up_NDR")]
        groups += [ParamGroup(part, rate) for part, rate in zip(parts, peak_rates(family, config, component))]
    return groups


def _refuse_targets(family: Family, denoiser: nn.Module, targets: Sequence[str]) -> None:
    """Raise ConfigError for patterns that no layer matches, with those of the family's own recipe."""
    own = recipes.shipped_for(family.name)
    advice = f"its recipe has {', '.join(own.lora.targets)}" if own else "patterns are matched with the ends of paths"
    raise ConfigError(f"lora.targets: no layer of {type(denoiser).__name__} matches {', '.join(targets)}; {advice}")


def _matrices(params: dict[str, nn.Parameter], kind: str) -> dict[str, nn.Parameter]:
    return {name: param for name, param in params.items() if name.endswith(kind)}


def peak_rates(family: Family, config: RunConfig, component: str) -> list[float]:
    """The peak learning rate of each of a component's groups: one, or with LoRA+ those of A and of B."""
    train, ratio = config.train, config.lora.up_ratio
    rate = train.lr if component == family.denoiser else train.text_encoder_lr or train.lr
    return [rate] if ratio == 1 else [rate, ratio * rate]


def fresh_adapter(family: Family, models: Models, config: RunConfig, subject: str) -> dict[str, Tensor]:
    """A subject's adapter before training, at its own rank, by parameter name: fresh, or that of `lora.init`."""
    components = trained_components(family, models, config)
    rows = [fresh_row(module, name, config.lora.rank, config.seed, subject) for name, module in components.items()]
    started = {name: matrix for row in rows for name, matrix in row.items()}
    given = initial_matrices(family, models, config) if config.lora.init else {}
    for name, (down, up) in given.items():
        started[f"{name}.down_NRD"][0, : len(down)] = down.double()
        started[f"{name}.up_NDR"][0, :, : len(down)] = up.double()
    return started


def lora_alpha(config: RunConfig) -> float:
    """Alpha of a run's adapters; by default the rank, which is a scale of 1."""
    return config.lora.rank if config.lora.alpha is None else config.lora.alpha


BEST = "best"
"""Kind of an engine's state that holds the weights that `train.stop` found best."""


def final_state(state: EngineState) -> dict[str, Tensor]:
    """The weights to give away: those that `train.stop` found best, else the EMA, where one was kept, else the masters.
    """
    return state.get(BEST) or state.get("ema") or state["master"]


@torch.no_grad()
def final_weights(family: Family, models: Models, state: EngineState, device: str) -> None:
    """Put the trained weights (their EMA, where one was kept) into the models. An empty state changes nothing."""
    final = final_state(state)
    for component, module in models.components(family.denoiser).items():
        for name, param in module.named_parameters():
            if f"{component}.{name}" in final:
                param.data = final[f"{component}.{name}"].to(device=device, dtype=param.dtype)


def publish_weights(
    folder: Path, family: Family, models: Models, config: RunConfig, record: dict[str, Any], state: EngineState
) -> list[Path]:
    """The weight files written for a finished subject: the adapter in a state, or the models as a diffusers folder."""
    if models.texts is not None and config.train.method != "lora":
        models = replace(models, text_encoders=models.texts.load(), texts=None)
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
