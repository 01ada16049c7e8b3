"""The stacked LoRA update against one adapter at a time, and how many operators it costs."""

import pytest
import torch

from dbtrain_kernels.cases import lora as cases
from dbtrain_kernels.cases import on
from dbtrain_kernels.dispatch import choose
from dbtrain_kernels.lora import MAX_RANK, lora

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def results(inputs):
    """Output, and gradients for a fixed cotangent."""
    names = ("x", "base", "down_NRD", "up_NDR")
    for name in names:
        inputs[name].requires_grad_()
    output = lora(**inputs)
    cotangent = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    gradients = torch.autograd.grad(output, [inputs[name] for name in names], cotangent)
    return {"output": output.detach(), **dict(zip(names, gradients))}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases()[:4], ids=lambda case: case.name)
def test_each_adapter_sees_only_its_segment(case, device):
    whole = results(on(device, case.inputs()))
    subjects = len(case.inputs()["scale_N"])
    share = len(case.inputs()["x"]) // subjects
    for n in range(subjects):
        one = on(device, case.inputs())
        cut = {name: one[name][n : n + 1].clone() for name in ("down_NRD", "up_NDR", "scale_N")}
        cut |= {name: one[name][n * share : (n + 1) * share].clone() for name in ("x", "base")}
        x, down, up = cut["x"].double(), cut["down_NRD"][0].double(), cut["up_NDR"][0].double()
        want = cut["base"].double() + cut["scale_N"].double() * (x @ down.T) @ up.T
        got = whole["output"][n * share : (n + 1) * share]
        assert (got.double() - want).norm() < 1e-6 * want.norm()
        # The cotangent of a part is the whole's part, so its gradients are too.
        assert whole["down_NRD"][n].isfinite().all() and whole["down_NRD"][n].abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_with_its_adapter(device):
    inputs = on(device, cases()[2].inputs())
    clean = results(on(device, cases()[2].inputs()))
    inputs["x"].data[0] = torch.nan
    got = results(inputs)
    for name in ("output", "x"):
        assert torch.equal(got[name][1:], clean[name][1:])
    for name in ("down_NRD", "up_NDR"):
        assert torch.equal(got[name][1:], clean[name][1:])


def test_an_input_of_another_dtype_is_taken_in_the_outputs():
    """As under autocast, where a norm's output is fp32 and the frozen layer's is bf16."""
    inputs = on("cpu", cases()[-1].inputs())
    inputs["x"] = inputs["x"].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora(**inputs).dtype == torch.bfloat16


def test_a_rank_that_is_too_high_says_so(monkeypatch):
    from dbtrain_kernels import dispatch

    monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
    with pytest.warns(UserWarning, match="lora runs as plain PyTorch, because the rank is 129"):
        assert not choose("lora", "cuda", f"the rank is {MAX_RANK + 1}, over {MAX_RANK}").fused
