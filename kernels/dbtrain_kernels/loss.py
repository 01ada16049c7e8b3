"""The fused loss: every factor of the training equation and its gradient in one read."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.cases import PACKS, Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem
from dbtrain_kernels.reference import Loss

FLOATS = (torch.float32, torch.bfloat16)
LAUNCHES = {"loss": lambda *_: 2}


def loss(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    alpha_B: Tensor,
    sigma_B: Tensor,
    weight_B: Tensor,
    parameterization: str,
    mask: Tensor | None = None,
) -> Loss:
    """What `reference.loss` is; on a GPU by one pass over the elements, with fp32 sums in a fixed order."""
    problem = dtype_problem(FLOATS, prediction=prediction) or dtype_problem((torch.float32,), clean=clean, noise=noise)
    if not choose("loss", prediction.device.type, problem).fused:
        return reference.loss(prediction, clean, noise, alpha_B, sigma_B, weight_B, parameterization, mask)
    images = [image.contiguous() for image in (prediction, clean, noise)]
    levels = [level_B.float().contiguous() for level_B in (alpha_B, sigma_B, weight_B)]
    mask = None if mask is None else mask.float().contiguous()
    total, per_sample_B, _ = loss_op(*images, *levels, parameterization, mask)
    return Loss(total, per_sample_B.detach())


@torch.library.custom_op("dbtrain::loss", mutates_args=())
def loss_op(
    prediction: Tensor, clean: Tensor, noise: Tensor, alpha_B: Tensor, sigma_B: Tensor, weight_B: Tensor,
    parameterization: str, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(total, per_sample_B, d total / d prediction in its dtype), of contiguous tensors."""
    from dbtrain_kernels.loss_triton import launch

    return launch(prediction, clean, noise, alpha_B, sigma_B, weight_B, parameterization, mask)


@loss_op.register_fake
def _(prediction, clean, *others):
    return clean.new_empty(()), clean.new_empty(len(clean)), torch.empty_like(prediction)


def _keep_gradient(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, total, per_sample_B, gradient):
    """Apply the chain rule through `total`; `loss` detaches the other outputs."""
    if total is None:
        return None, *[None] * 7
    (kept,) = ctx.saved_tensors
    # A factor of as many dimensions promotes the product to fp32; a 0-dim factor would be rounded to bf16 first.
    return (kept * total.float().view([1] * kept.dim())).to(kept.dtype), *[None] * 7


loss_op.register_autograd(_backward, setup_context=_keep_gradient)


def inputs(
    shape: tuple[int, ...] = (3, 4, 5, 7), parameterization: str = "epsilon", dtype: torch.dtype = torch.float32,
    masked: bool = False, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments. dtype: that of the prediction."""
    drawn: dict[str, Any] = {"generator": seeded(device, 1), "device": device}
    prediction, clean, noise = (torch.randn(shape, **drawn) for _ in range(3))
    angle_B = torch.rand(shape[0], **drawn) * 1.5
    arguments = {
        "prediction": prediction.to(dtype),
        "clean": clean,
        "noise": noise,
        "alpha_B": angle_B.cos(),
        "sigma_B": angle_B.sin(),
        "weight_B": torch.rand(shape[0], **drawn) + 0.1,
        "parameterization": parameterization,
    }
    if masked:
        arguments["mask"] = torch.rand((shape[0], 1, *shape[2:]), **drawn)
    return arguments


def work() -> list[Case]:
    """A bf16 prediction. Bytes: f, x and eps are read, the gradient is written, then read and written in backward."""
    call = partial(inputs, dtype=torch.bfloat16, parameterization="v_prediction")
    moved = 2 + 4 + 4 + 2 + 2 + 2
    return [Case(name, partial(call, shape), moved=math.prod(shape) * moved) for name, shape in PACKS.items()]
