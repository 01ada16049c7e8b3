"""Stability's names of the layers of a U-Net, which kohya, ComfyUI and A1111 use, and diffusers' names, both ways."""

import re

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a residual block: Stability's name by diffusers'."""
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Layers outside of the blocks."""
MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}


def to_stability(path: str, layers: int = 2, attentive_ups: frozenset[int] | None = None) -> str:
    """Stability's path of a U-Net layer; raises KeyError for one without a counterpart.

    layers: residual blocks in each down block (up blocks have one more). attentive_ups: numbers of the up blocks with
    attention, behind which an upsampler comes third and not second; None is all.
    """
    if path in ENDS:
        return ENDS[path]
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(\w+)\.(\d+)\.(.+)", path)
    if match is None:
        raise KeyError(path)
    side, block, middle, kind, number, rest = match.groups()
    rest = RESNET[rest] if kind == "resnets" else rest
    if middle:
        return f"{MIDDLE[f'{kind}.{number}']}.{rest}"
    i, j = int(block), int(number)
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
    if kind == "upsamplers":
        place = 2 if attentive_ups is None or i in attentive_ups else 1
        return f"output_blocks.{(layers + 1) * i + layers}.{place}.conv"
    start = f"input_blocks.{(layers + 1) * i + j + 1}" if side == "down" else f"output_blocks.{(layers + 1) * i + j}"
    return f"{start}.{('resnets', 'attentions').index(kind)}.{rest}"


def from_stability(path: str, layers: int = 2) -> str:
    """diffusers' path of a U-Net layer; raises KeyError for one that is none of Stability's."""
    ends = {theirs: ours for ours, theirs in ENDS.items()}
    if path in ends:
        return ends[path]
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)|middle_block\.(\d)\.(.+)", path)
    if match is None:
        raise KeyError(path)
    side, count, place, rest, middle, middle_rest = match.groups()
    if middle:
        block = next(f"mid_block.{ours}" for ours, theirs in MIDDLE.items() if theirs == f"middle_block.{middle}")
        return f"{block}.{_plain_rest(block, middle_rest)}"
    if rest == "op":
        return f"down_blocks.{int(count) // (layers + 1) - 1}.downsamplers.0.conv"
    i, j = divmod(int(count) - (side == "input"), layers + 1)
    if rest == "conv":
        return f"up_blocks.{i}.upsamplers.0.conv"
    block = f"{'down' if side == 'input' else 'up'}_blocks.{i}.{('resnets', 'attentions')[int(place)]}.{j}"
    return f"{block}.{_plain_rest(block, rest)}"


def _plain_rest(block: str, rest: str) -> str:
    return next(ours for ours, theirs in RESNET.items() if theirs == rest) if ".resnets." in block else rest
