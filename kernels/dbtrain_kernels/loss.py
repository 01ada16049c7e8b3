"""The fused loss: every factor of the training equation, its gradient and its parts by subject in one read."""

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.dispatch import choose, dtype_problem
from dbtrain_kernels.reference import Loss

FLOATS = (torch.float32, torch.bfloat16)


def loss(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    alpha_B: Tensor,
    sigma_B: Tensor,
    weight_B: Tensor,
    parameterization: str,
    subject_B: Tensor | None = None,
    subjects: int = 1,
    mask: Tensor | None = None,
) -> Loss:
    """What `reference.loss` is; on a GPU by one pass over the elements, with fp32 sums in a fixed order."""
    problem = dtype_problem(FLOATS, prediction=prediction) or dtype_problem((torch.float32,), clean=clean, noise=noise)
    arguments = (prediction, clean, noise, alpha_B, sigma_B, weight_B, parameterization, subject_B, subjects, mask)
    if not choose("loss", prediction.device.type, problem).fused:
        return reference.loss(*arguments)
    needed = torch.is_grad_enabled() and prediction.requires_grad
    total, per_sample_B, per_subject_N, _ = loss_op(*arguments, needed)
    return Loss(total, per_sample_B.detach(), per_subject_N)


@torch.library.custom_op("dbtrain::loss", mutates_args=())
def loss_op(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    alpha_B: Tensor,
    sigma_B: Tensor,
    weight_B: Tensor,
    parameterization: str,
    subject_B: Tensor | None,
    subjects: int,
    mask: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, per_sample_B, per_subject_N, d total / d prediction in its dtype, or empty where it is not wanted)."""
    from dbtrain_kernels.loss_triton import launch

    return launch(
        prediction.contiguous(),
        clean.contiguous(),
        noise.contiguous(),
        alpha_B.float().contiguous(),
        sigma_B.float().contiguous(),
        weight_B.float().contiguous(),
        parameterization,
        None if subject_B is None else subject_B.contiguous(),
        subjects,
        None if mask is None else mask.float().contiguous(),
        with_gradient,
    )


@loss_op.register_fake
def _(prediction, clean, noise, alpha_B, sigma_B, weight_B, parameterization, subject_B, subjects, mask, with_gradient):
    gradient = prediction.new_empty(prediction.shape if with_gradient else (0,))
    return clean.new_empty(()), clean.new_empty(len(clean)), clean.new_empty(subjects), gradient


def _keep_gradient(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.has_gradient = inputs[-1]
    ctx.save_for_backward(output[3], inputs[7])


def _backward(ctx, total, per_sample_B, per_subject_N, gradient):
    """Chain rule through total and per_subject_N; `loss` detaches the other outputs."""
    if not ctx.has_gradient:
        raise RuntimeError("dbtrain::loss was called with_gradient=False, so it cannot be differentiated")
    kept, subject_B = ctx.saved_tensors
    factor = None if total is None else total.float()
    if per_subject_N is not None:
        share = per_subject_N[0] if subject_B is None else per_subject_N[subject_B]
        factor = share if factor is None else factor + share
    if factor is None:
        return None, *[None] * 10
    # Four dimensions promote the product to fp32; a 0-dim factor would be rounded to bf16 first.
    return (kept * factor.view(-1, *[1] * (kept.dim() - 1))).to(kept.dtype), *[None] * 10


loss_op.register_autograd(_backward, setup_context=_keep_gradient)
