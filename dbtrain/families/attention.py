"""Attention implementations, chosen once and checked on the processors that will really run."""

from torch import nn

from dbtrain.errors import ConfigError


def engage_attention(denoiser: nn.Module, choice: str, device_type: str) -> str:
    """The name of the attention that now runs in every layer of a U-Net; raises ConfigError when it cannot."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    name = "sdpa" if choice == "auto" else choice
    processors = {"sdpa": AttnProcessor2_0, "math": AttnProcessor, "xformers": XFormersAttnProcessor}
    if name == "xformers":
        _require_xformers(device_type)
        denoiser.enable_xformers_memory_efficient_attention()
    else:
        denoiser.set_attn_processor(processors[name]())
    running = {type(processor) for processor in denoiser.attn_processors.values()}
    if running != {processors[name]}:
        found = ", ".join(sorted(kind.__name__ for kind in running))
        raise ConfigError(f"model.attention: asked for {name}, but these processors run: {found}; choose another one")
    return name


def _require_xformers(device_type: str) -> None:
    if device_type != "cuda":
        raise ConfigError(
            f"model.attention: xformers needs a CUDA device, and this run is on {device_type}; use model.attention=auto"
        )
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "model.attention: xformers is not installed; pip install 'dbtrain[gpu]', or use model.attention=auto"
        ) from error
