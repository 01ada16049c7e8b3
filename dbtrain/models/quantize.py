"""The frozen denoiser of a LoRA in few bits: its large linear layers, by torchao or bitsandbytes.

Each layer stays a linear layer whose weight is turned back into numbers as it is used, so adapters on it compute as
they always do. Kept whole are norms, embeddings, modulation, and the first and last projections: they are small, and
errors in them reach everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec

from torch import nn

from dbtrain.errors import ConfigError, first_line
from dbtrain.models.family import Family

LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
SENSITIVE = re.compile(r"norm|mod(ulation)?(?![a-z])|embed|time")
"""Parts of names inside a block that are kept whole."""
LEAST = 64
"""Fewest input features of a layer that is worth it: nf4 has one scale for 64 weights."""


def quantize(denoiser: nn.Module, family: Family, kind: str) -> list[str]:
    """Put a frozen denoiser's large layers into few bits, and return their paths. `none` does nothing.

    Raises ConfigError where the library is not installed or cannot do it here.
    """
    if kind == "none":
        return []
    library = LIBRARIES[kind]
    if find_spec(library) is None:
        raise ConfigError(f"model.quantize: {kind} needs {library}; pip install 'dbtrain[quantize]', or set it to none")
    paths = quantizable(denoiser, family)
    if not paths:
        raise ConfigError(f"model.quantize: {type(denoiser).__name__} has no layer to quantize; set it to none")
    try:
        MAKERS[library](denoiser, set(paths), kind)
    except (ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise ConfigError(f"model.quantize: {library} cannot make {kind} here: {first_line(error)}") from error
    return paths


def quantizable(denoiser: nn.Module, family: Family) -> list[str]:
    """Paths of the linear layers inside the blocks that repeat, but for the sensitive ones."""
    blocks = [path for path, module in denoiser.named_modules() if type(module).__name__ in family.regions]
    return [
        path
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and module.in_features >= LEAST and module.in_features % LEAST == 0
        and any(path.startswith(f"{block}.") and not SENSITIVE.search(path[len(block):]) for block in blocks)
    ]  # fmt: skip


def _by_torchao(denoiser: nn.Module, paths: set[str], kind: str) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    quantize_(denoiser, config, filter_fn=lambda _, path: path in paths)


def _by_bitsandbytes(denoiser: nn.Module, paths: set[str], kind: str) -> None:
    import bitsandbytes

    for path in paths:
        layer = denoiser.get_submodule(path)
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None,
            compute_dtype=layer.weight.dtype, quant_type=kind, device="meta",
        )  # fmt: skip
        device = layer.weight.device
        made.weight = bitsandbytes.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type=kind)
        made.bias = layer.bias
        denoiser.set_submodule(path, made.to(device))  # moving it is what quantizes


MAKERS: dict[str, Callable[[nn.Module, set[str], str], None]] = {
    "torchao": _by_torchao,
    "bitsandbytes": _by_bitsandbytes,
}
