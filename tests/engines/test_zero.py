"""The DeepSpeed engine in one process: every ZeRO stage does the arithmetic of stage 0, and stage 0 that of AdamW.

Tolerances. Within one process all stages run the same kernels on the same numbers, so gradients agree to the bit but
for the clip factor (DeepSpeed adds its 1e-6 at two places: a relative 1e-6 of the gradient). AdamW's update
m / (sqrt(v) + eps) has slope at most 1 / eps; with eps = 1e-4 and gradient entries below 1, four steps of lr = 1e-3
keep weights within 4 * lr * 1e-6 / (2 * sqrt(1e-6 * eps ...)) < 1e-6 of each other, which is also 4 roundings (2^-23)
of a weight of size 2. Measured: see CLOSE.
"""

import subprocess
import sys
from functools import cache

import pytest
import torch

from dbtrain.errors import EngineError
from tests.kit.main_job import rig, small_config

CLOSE = {"master": 1e-6, "exp_avg": 1e-6, "exp_avg_sq": 1e-6, "ema": 1e-6}
STEADY = ("train.eps=1e-4", "train.steps=4", "train.ema=0.9", "train.schedule=cosine", "train.warmup_steps=1")
METHODS = ("lora", "full")


@cache
def trajectory(stage: int, method: str) -> tuple[list[dict], dict, dict]:
    """(measured values of four steps, the state after two, the state after four)."""
    with rig(small_config(*STEADY, f"train.method={method}", f"engine.zero.stage={stage}")) as made:
        first = made.steps(0, 2)
        middle = made.state()
        return first + made.steps(2, 4), middle, made.state()


def assert_close(got: dict, want: dict, close=CLOSE) -> None:
    """Every kind of state within `close` times the largest entry of the kind, or absolutely where that is below 1."""
    assert got.keys() == want.keys()
    for kind, tensors in want.items():
        assert got[kind].keys() == tensors.keys()
        scale = max(1.0 if kind in ("master", "ema") else 0.0, *(float(one.abs().max()) for one in tensors.values()))
        for name, tensor in tensors.items():
            difference = float((got[kind][name] - tensor).abs().max())
            assert difference <= close[kind] * scale, (kind, name, difference / scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_equals_stage_0(stage, method):
    values, _, state = trajectory(stage, method)
    plain, _, plain_state = trajectory(0, method)
    assert_close(state, plain_state)
    for got, want in zip(values, plain):
        for name in ("loss", "loss_instance", "loss_prior", "lr", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_stage_0_is_torchs_adamw(method):
    """Gradients from a plain backward pass, clipping and AdamW from torch, EMA by hand: no engine."""
    config = small_config(*STEADY, f"train.method={method}", "train.clip_norm=0.5")
    with rig(config) as made:
        params = {name: param.detach().clone().requires_grad_() for name, param in made.engine.names.items()}
        module = made.engine.deepspeed.module
        names = {id(param): name for name, param in made.engine.names.items()}
        inner = {names[id(param)]: name for name, param in module.named_parameters() if id(param) in names}
        adamw = torch.optim.AdamW(params.values(), lr=config.train.lr, eps=config.train.eps, weight_decay=0.01)
        ema = {name: param.detach().double() for name, param in params.items()}
        scales = [1.0, 1.0, 0.75, 0.25]
        for step, scale in enumerate(scales):
            batch = made.bank.batch(step, range(4), "cpu")
            replaced = {inner[name]: param for name, param in params.items()}
            torch.func.functional_call(module, replaced, (batch, step)).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
            adamw.param_groups[0]["lr"] = config.train.lr * scale
            adamw.step()
            adamw.zero_grad()
            ema = {name: 0.9 * ema[name] + 0.1 * param.detach().double() for name, param in params.items()}
            (values,) = made.steps(step, step + 1)
            assert values["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        state = made.state()
    want = {
        "master": {name: param.detach() for name, param in params.items()},
        "exp_avg": {name: adamw.state[param]["exp_avg"] for name, param in params.items()},
        "exp_avg_sq": {name: adamw.state[param]["exp_avg_sq"] for name, param in params.items()},
        "ema": {name: value.float() for name, value in ema.items()},
    }
    assert_close(state, want, dict.fromkeys(want, 1e-5))
    assert any(float(value.abs().max()) > 0 for value in want["exp_avg"].values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("saved", "loaded"), [(0, 3), (3, 1), (1, 2), (2, 0)])
def test_a_state_of_one_stage_goes_on_at_another(saved, loaded, method):
    _, middle, _ = trajectory(saved, method)
    values, _, last = trajectory(0, method)
    with rig(small_config(*STEADY, f"train.method={method}", f"engine.zero.stage={loaded}")) as made:
        made.engine.load(middle, 2)
        assert_close(made.state(), middle, dict.fromkeys(middle, 0.0))
        resumed = made.steps(2, 4)
        assert_close(made.state(), last)
    assert [one["loss"] for one in resumed] == pytest.approx([one["loss"] for one in values[2:]], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_stage_resumes_to_the_bit(stage):
    _, middle, last = trajectory(stage, "lora")
    with rig(small_config(*STEADY, f"engine.zero.stage={stage}")) as made:
        made.engine.load(middle, 2)
        made.steps(2, 4)
        assert_close(made.state(), last, dict.fromkeys(last, 0.0))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_training_leaves_the_process_as_it_found_it(stage):
    """Stage 3 replaces `linear` everywhere; were it to stay, what the process trains next would round otherwise."""
    linear = torch.nn.functional.linear
    with rig(small_config(*STEADY, f"engine.zero.stage={stage}")) as made:
        made.steps(0, 1)
        assert (torch.nn.functional.linear is linear) == (stage < 3)
    assert torch.nn.functional.linear is linear


def test_a_state_of_other_parameters_is_refused():
    _, middle, _ = trajectory(0, "full")
    with rig(small_config(*STEADY)) as made, pytest.raises(EngineError, match="trained parameters, such as unet"):
        made.engine.load(middle, 2)


@pytest.mark.parametrize(("stage", "micro"), [(0, 1), (1, 2), (2, 1), (3, 1)])
def test_accumulation_equals_the_whole_batch(stage, micro):
    """Sums of four terms in another order: a few roundings of the largest term, hence 1e-5 of the largest entry."""
    _, _, whole = trajectory(0, "lora")
    with rig(small_config(*STEADY, f"train.micro_batch={micro}", f"engine.zero.stage={stage}")) as made:
        assert made.plan.accumulation == 4 // micro
        values = made.steps(0, 4)
        assert_close(made.state(), whole, dict.fromkeys(whole, 1e-5))
    assert [one["loss"] for one in values] == pytest.approx([one["loss"] for one in trajectory(0, "lora")[0]], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_bites_and_the_norm_is_the_unclipped_one(stage):
    """After one step the first moment is (1 - beta1) times the clipped gradient."""
    norms = {}
    for clip in (0.01, None):
        with rig(
            small_config("train.method=full", f"train.clip_norm={clip or 'null'}", f"engine.zero.stage={stage}")
        ) as made:
            (values,) = made.steps(0, 1)
            moment = sum(float(one.double().square().sum()) for one in made.state()["exp_avg"].values()) ** 0.5
            norms[clip] = values["grad_norm"], moment / (1 - made.config.train.beta1)
    assert norms[None][0] > 0.1
    assert norms[0.01][1] == pytest.approx(0.01, rel=2e-4)  # DeepSpeed's 1e-6 beside a clip norm of 1e-2
    assert norms[None][1] == pytest.approx(norms[None][0], rel=1e-5)
    assert norms[0.01][0] == pytest.approx(norms[None][0], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_computes_in_bf16_and_keeps_fp32_masters(stage, method):
    """Updates of 1e-6 are lost in a bf16 weight of size 0.1 (spacing 5e-4), but not in an fp32 one."""
    plain = trajectory(0, method)[0][0]["loss"]
    config = small_config(
        f"train.method={method}", "train.precision=bf16", "train.lr=1e-6", f"engine.zero.stage={stage}"
    )
    with rig(config) as made:
        before = made.state()["master"]
        (values,) = made.steps(0, 1)
        after = made.state()["master"]
    assert values["loss"] != plain
    assert values["loss"] == pytest.approx(plain, rel=2e-2)
    moved = [float((after[name] - before[name]).abs().max()) for name in before]
    assert max(moved) == pytest.approx(1e-6, rel=0.2)
    assert sum(one > 0 for one in moved) >= len(moved) / 2


@pytest.mark.parametrize(("stage", "parameters"), [(1, False), (2, False), (3, False), (3, True)])
def test_offload_changes_no_number(stage, parameters):
    _, _, plain = trajectory(stage, "lora")
    offload = ["engine.zero.offload_optimizer=true", *(["engine.zero.offload_parameters=true"] if parameters else [])]
    with rig(small_config(*STEADY, f"engine.zero.stage={stage}", *offload)) as made:
        zero = made.engine.deepspeed.zero_offload_optimizer()
        assert zero.device == "cpu"
        made.steps(0, 4)
        assert_close(made.state(), plain)


def test_a_text_encoder_trains_at_a_rate_of_its_own():
    config = small_config("train.method=full", "train.text_encoder=true", "train.text_encoder_lr=1e-5")
    with rig(config) as made:
        before = made.state()["master"]
        made.steps(0, 1)
        after = made.state()["master"]
    moved = {
        part: max(float((after[name] - before[name]).abs().max()) for name in after if name.startswith(part + "."))
        for part in ("unet", "text_encoder")
    }
    assert moved["unet"] == pytest.approx(1e-3, rel=0.2)
    assert moved["text_encoder"] == pytest.approx(1e-5, rel=0.2)


def test_gradient_checkpointing_changes_no_number():
    with rig(small_config(*STEADY, "train.gradient_checkpointing=true")) as made:
        made.steps(0, 4)
        assert_close(made.state(), trajectory(0, "lora")[2])


def test_recomputed_blocks_read_no_generator(monkeypatch):
    """A CUDA graph cannot read one while it is recorded, and the blocks draw nothing."""
    read, real = [], torch.get_rng_state
    with rig(small_config("train.gradient_checkpointing=true")) as made:
        monkeypatch.setattr(torch, "get_rng_state", lambda: read.append(1) or real())
        made.steps(0, 1)
    assert not read


PRETENDED = """
import torch, torch.distributed as dist
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, lambda index: None
import deepspeed
print("before")
real = dist.init_process_group
dist.init_process_group = lambda backend, **more: real("gloo", **more)
deepspeed.init_distributed = lambda **more: None
from dbtrain.engines.world import start_world
print(start_world().device)
"""


def test_nothing_is_printed_where_there_is_a_gpu():
    """DeepSpeed's table of operators prints a line for each that it cannot build, when it is first looked at; with a
    GPU and no CUDA toolkit these are seven, and what `--json` prints must be JSON."""
    done = subprocess.run([sys.executable, "-c", PRETENDED], capture_output=True, text=True)
    assert done.stdout.split("before\n")[-1] == "cuda:0\n", (done.stdout, done.stderr)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_scales_the_loss_and_leaves_out_a_step_that_overflows(stage):
    """Losses are fp32's within fp16's roundings (2^-11 each, about forty on the way of the small U-Net), an overflow
    changes no bit of the state but its scale, and the next step is made."""
    plain = trajectory(0, "lora")[0]
    words = (*STEADY, "train.precision=fp16", f"engine.zero.stage={stage}")
    with rig(small_config(*words)) as made:
        (first,) = made.steps(0, 1)
        assert first["loss"] == pytest.approx(plain[0]["loss"], rel=2 * 40 * 2**-11)
        assert first["loss"] != plain[0]["loss"]
        assert first["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.1), "the scale is taken out"
        before = made.state()
        made.engine.scales.scale_N[0] = 2.0**40
        (second,) = made.steps(1, 2)
        after = made.state()
        assert second["grad_norm"] == 0.0 and second["loss"] == pytest.approx(plain[1]["loss"], rel=0.1)
        assert made.engine.scales.skipped_N.item() == 1
        for kind in before.keys() - {"scaling"}:
            assert all(torch.equal(before[kind][name], after[kind][name]) for name in before[kind]), kind
        made.engine.scales.scale_N[0] = 4096.0
        middle = made.state()
        made.steps(2, 4)
        end = made.state()
    moved = [float((end["master"][name] - after["master"][name]).abs().max()) for name in end["master"]]
    assert max(moved) > 1e-4
    if stage:
        return
    with rig(small_config(*words)) as again:
        again.engine.load(middle, 2)
        again.steps(2, 4)
        resumed = again.state()
    assert all(torch.equal(end[kind][name], resumed[kind][name]) for kind in end for name in end[kind])
