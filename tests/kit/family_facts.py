"""What the tests of a family know of its stock pipeline, and what no row says: a row of facts for each family."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from dbtrain.models.family import Family
from dbtrain.values import Batch, Conditioning, Role

IF_TARGETS = tuple(f"attentions.*.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"))
Text = tuple[Tensor, Tensor | None]
"""Token states and pooled text. Where a caption's real tokens alone count, the states are of the longest caption."""


def as_it_is(x_BCHW: Tensor) -> Tensor:
    return x_BCHW


def same(x: Tensor, height: int, width: int) -> Tensor:
    return x


@dataclass(frozen=True)
class Facts:
    """text(pipeline, captions) -> token states and pooled text of the pipeline's own `encode_prompt`.

    native(latents [B, C, h, w]) -> latents as the pipeline and its denoiser have them.
    ours(native, h, w) is its inverse. given(latents): as the pipeline takes them at the start. mean: whether training
    has the mean of the autoencoder's posterior in place of a sample. film: whether the autoencoder takes films.
    sample: the name of the denoiser's argument that has them. side: pixels of a cell of the random model's latents.
    heard(arguments by place, by name) -> the latents and the time in a call of the denoiser, where it is not called by
    names. sign: -1 where it says x0 - eps. listed: whether it takes and gives a list, of films of one frame.
    stock: whether the pipeline takes latents and calls back, so that its own steps can be watched; those of cascades
    take none, and `test_super.py` compares with them. targets: of adapters that its pipeline loads.
    idle: denoiser layers whose outputs nothing of a prediction depends on, so that an adapter there has no gradient.
    tolerance: of conditioning and prediction, where the pipeline pads captions to another length than we do.
    first: the noise level of pure noise to its pipeline. least: fewest steps that the scheduler can sample with; a
    stretch to a last noise level divides by zero at 1.
    """

    text: Callable[[Any, Sequence[str]], Text]
    native: Callable[[Tensor], Tensor] = as_it_is
    ours: Callable[[Tensor, int, int], Tensor] = same
    sample: str = "sample"
    side: int = 2
    idle: frozenset[str] = frozenset()
    given: Callable[[Tensor], Tensor] | None = None
    mean: bool = False
    film: bool = False
    sign: int = 1
    listed: bool = False
    tolerance: float = 0.0
    least: int = 1
    first: float = 1.0
    stock: bool = True
    targets: tuple[str, ...] = ("att*", "ff*", "feed_forward*", "img_mlp*", "proj_mlp")

    def heard(self, places: Sequence[Any], words: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The latents, as the pipeline has them, and the time in a call of the denoiser."""
        x = places[0] if places else words[self.sample]
        time = places[1] if len(places) > 1 else words["timestep"]
        return (torch.stack(x).squeeze(2) if self.listed else x), time

    def says(self, prediction_BCHW: Tensor) -> tuple[Any]:
        """What the denoiser returns where this is the velocity eps - x0."""
        native = self.native(self.sign * prediction_BCHW)
        return (list(native.unsqueeze(2)) if self.listed else native,)

    def said(self, output: Any, height: int, width: int) -> Tensor:
        """The velocity eps - x0 in what the denoiser returned."""
        native = torch.stack(output).squeeze(2) if self.listed else output
        return self.sign * self.ours(native, height, width)

    def start(self, x_BCHW: Tensor) -> Tensor:
        """Latents as the pipeline's call takes them."""
        return (self.given or self.native)(x_BCHW)


def _unguided(pipeline: Any, captions: Sequence[str]) -> Any:
    return pipeline.encode_prompt(
        list(captions), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )


def _sd(pipeline: Any, captions: Sequence[str]) -> Text:
    return _unguided(pipeline, captions)[0], None


def _sdxl(pipeline: Any, captions: Sequence[str]) -> Text:
    states, _, pooled, _ = _unguided(pipeline, captions)
    return states, pooled


def _sd3(pipeline: Any, captions: Sequence[str]) -> Text:
    states, _, pooled, _ = pipeline.encode_prompt(list(captions), None, None, do_classifier_free_guidance=False)
    return states, pooled


def _flux(pipeline: Any, captions: Sequence[str]) -> Text:
    states, pooled, _ = pipeline.encode_prompt(list(captions), None)
    return states, pooled


def _flux_native(x_BCHW: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(x_BCHW, *x_BCHW.shape)  # diffusers 0.42: what its pipeline calls


def _flux_ours(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(tokens_BLD, 8 * height, 8 * width, 8)


def _klein(pipeline: Any, captions: Sequence[str]) -> Text:
    return pipeline.encode_prompt(list(captions))[0], None


def _klein_native(x_BCHW: Tensor) -> Tensor:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline._pack_latents(x_BCHW)


def _klein_ours(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    from diffusers import Flux2KleinPipeline

    ids = Flux2KleinPipeline._prepare_latent_ids(tokens_BLD.new_empty(len(tokens_BLD), 1, height, width))
    return Flux2KleinPipeline._unpack_latents_with_ids(tokens_BLD, ids, height, width)


def _zimage(pipeline: Any, captions: Sequence[str]) -> Text:
    found = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)[0]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True), None


def _masked(pipeline: Any, captions: Sequence[str]) -> Text:
    states, mask = pipeline.encode_prompt(list(captions), max_sequence_length=512)
    mask = torch.ones(states.shape[:2]) if mask is None else mask
    return (states.flatten(2) * mask[..., None]).to(states), None


def _if(pipeline: Any, captions: Sequence[str]) -> Text:
    return pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)[0], None


def _chroma(pipeline: Any, captions: Sequence[str]) -> Text:
    states, _, mask, *_ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return states * mask[..., None], None


def _gemma(pipeline: Any, captions: Sequence[str]) -> Text:
    told = {}
    if type(pipeline).__name__ == "SanaPipeline":
        told["complex_human_instruction"] = (
            signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        )
    states, mask, *_ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False, **told)
    return states * mask[..., None], None


def _ideogram4(pipeline: Any, captions: Sequence[str]) -> Text:
    """The pipeline has padding before the text."""
    states, _, _, kinds = pipeline.encode_prompt(list(captions), 1, 1, 1024, "cpu")
    rows = [row[kind == 3] for row, kind in zip(states, kinds)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), None


def _ideogram4_native(x_BCHW: Tensor) -> Tensor:
    """Behind the places of the text, which say nothing."""
    return torch.nn.functional.pad(_klein_native(x_BCHW), (0, 0, 1024, 0))


def _ideogram4_ours(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    return tokens_BLD[:, -height * width :].mT.unflatten(2, (height, width))


FACTS = {
    "sd": Facts(_sd),
    "sdxl": Facts(_sdxl),
    "playground": Facts(_sdxl, sign=-1),
    "sd3": Facts(_sd3, sample="hidden_states", side=8, idle=frozenset({"transformer_blocks.2.attn.add_q_proj"})),
    "flux": Facts(_flux, _flux_native, _flux_ours, sample="hidden_states", side=8),
    "flux2_klein": Facts(
        _klein, _klein_native, _klein_ours, sample="hidden_states", side=16, given=as_it_is, mean=True
    ),
    "flux2": Facts(_klein, _klein_native, _klein_ours, sample="hidden_states", side=16, given=as_it_is, mean=True),
    "zimage": Facts(_zimage, side=8, mean=True, sign=-1, listed=True),
    "qwen_image": Facts(
        _masked,
        _flux_native,
        _flux_ours,
        sample="hidden_states",
        side=8,
        film=True,
        idle=frozenset(
            f"transformer_blocks.1.{path}"
            for path in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        ),
        tolerance=1e-12,
        least=2,
    ),
    "chroma": Facts(_chroma, _flux_native, _flux_ours, sample="hidden_states", side=8),
    "lumina2": Facts(_gemma, sample="hidden_states", side=8, sign=-1),
    "sana": Facts(_gemma, side=16, mean=True),
    "ideogram4": Facts(
        _ideogram4,
        _ideogram4_native,
        _ideogram4_ours,
        sample="hidden_states",
        side=16,
        given=_klein_native,
        mean=True,
        sign=-1,
        first=1 - 1 / (1 + math.exp(9)),  # its noise levels are cut there
        tolerance=1e-7,  # the pipeline sends states through float32
    ),
    "krea2": Facts(_masked, _flux_native, _flux_ours, sample="hidden_states", side=8, film=True),
    "if_stage1": Facts(_if, side=4, stock=False, targets=IF_TARGETS),
    "if_stage2": Facts(_if, side=4, stock=False, targets=IF_TARGETS),
    "x4_upscaler": Facts(_sd, side=4, stock=False),
}
"""The facts of each family, by its name."""


def real_states(conditioning: Conditioning, tokens: int) -> Tensor:
    """The states of this many first tokens, zero where they are padding that the denoiser does not see."""
    states, mask = conditioning.states_BTD[:, :tokens], conditioning.mask_BT
    return states if mask is None else states * mask[:, :tokens, None]


def shown(family: Family, batch: Batch, x_t_BCHW: Tensor, rows: Tensor | None = None) -> Batch:
    """The batch with a random guide for each sample, where a family's denoiser takes one; rows: which of them."""
    if family.guide is None:
        return batch
    stream = torch.Generator().manual_seed(7)
    most = 1 + int(rows.max()) if rows is not None else len(x_t_BCHW)
    guide = torch.randn(most, 3, *x_t_BCHW.shape[2:], generator=stream, dtype=x_t_BCHW.dtype)
    level = torch.arange(most) * 20
    rows = torch.arange(most) if rows is None else rows
    return replace(batch, guide_BCHW=guide[rows], level_B=level[rows])


def batch_of(count: int, height: int = 128, width: int = 128) -> Batch:
    """Samples that say nothing but their size in pixels."""
    zeros = torch.zeros(count, dtype=torch.long)
    sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).repeat(count, 1)
    return Batch(torch.zeros(count, 8, 16, 16), zeros, torch.full_like(zeros, Role.INSTANCE), zeros, sizes)
