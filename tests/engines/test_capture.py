"""How a step is run: what can be, what is refused, compiled blocks, and one recorded graph for a whole step."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from dbtrain.engines import capture
from dbtrain.engines.capture import (
    GRAPHS,
    WARM_STEPS,
    Capture,
    Compiled,
    Eager,
    Recorded,
    as_python,
    choose_capture,
    compile_regions,
    make_runner,
    release,
)
from dbtrain.errors import ConfigError, EngineError
from dbtrain.settings.config import EngineConfig
from dbtrain.settings.recipes import loads
from dbtrain.values import Batch

RECIPE = "train: {steps: 4}"


def settings(choice, kind="packed"):
    return EngineConfig(capture=choice, kind=kind)


@pytest.mark.parametrize(
    "choice, kind, device, mode, reason",
    [
        ("auto", "packed", "cuda", "graph", "auto: a pack's step"),
        ("auto", "packed", "cpu", "off", "auto: there are no CUDA graphs on cpu"),
        ("auto", "zero", "cuda", "off", "auto: DeepSpeed's step runs Python"),
        ("compile", "packed", "cpu", "compile", "asked for"),
        ("compile", "zero", "cuda", "compile", "asked for"),
        ("off", "packed", "cuda", "off", "asked for"),
        ("graph", "packed", "cuda", "graph", "asked for"),
        ("compiled_graph", "packed", "cuda", "compiled_graph", "asked for"),
    ],
)
def test_what_a_choice_comes_to(choice, kind, device, mode, reason):
    got = choose_capture(settings(choice, kind), device)
    assert got.mode == mode and got.reason.startswith(reason)
    assert got.may_fall_back == (choice == "auto" and mode == "graph")


@pytest.mark.parametrize("choice", GRAPHS)
def test_a_graph_on_a_cpu_is_refused(choice):
    with pytest.raises(ConfigError, match=rf"engine\.capture: {choice} needs a CUDA device, .* on cpu; use engine"):
        choose_capture(settings(choice), "cpu")


@pytest.mark.parametrize(
    "words, why",
    [
        (["engine.kind=zero", "engine.capture=compiled_graph"], r"compiled_graph cannot record"),
        (["engine.kind=zero", "engine.capture=graph"], r"cannot record DeepSpeed's step.*use engine\.kind=packed"),
        (["engine.capture=compile", "engine.zero.stage=3", "train.method=full"], "ZeRO stage 3 gathers"),
    ],
)
def test_what_an_engine_cannot_do_is_a_config_error(words, why):
    with pytest.raises(ConfigError, match=rf"engine\.capture.*{why}"):
        loads(RECIPE, "small", words)


def batch(seed=0, count=2, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 4, generator=generator)
    numbers = torch.arange(count)
    return Batch(images, numbers, numbers, numbers, torch.zeros(count, 6)).to(device)


class Summing:
    """A step that adds its batch to a sum that stays, as a training step changes its arenas."""

    def __init__(self, device="cpu"):
        self.total = torch.zeros(4, device=device)
        self.runs = 0

    def __call__(self, batch):
        self.runs += 1
        self.total += batch.images_BCHW.sum(0)


class PretendGraph:
    """A CUDA graph's contract on a CPU: recording executes nothing, replaying does what was recorded."""

    def __init__(self, step):
        self.step, self.replays = step, 0

    def replay(self):
        self.replays += 1
        self.step()


def on_a_cpu(recorded, fail=None):
    """Warm-up and recording without CUDA."""

    def record(step, buffers):
        if fail:
            raise RuntimeError(fail)
        recorded.graph = PretendGraph(lambda: recorded.inner(step, buffers))

    recorded._beside = lambda step, buffers: recorded.inner(step, buffers)
    recorded._graph = record
    return recorded


GRAPH = Eager(Capture("graph", "asked for"))


def test_every_call_is_one_step_warm_recorded_or_replayed():
    step = Summing()
    recorded = on_a_cpu(Recorded(GRAPH))
    want = torch.zeros(4)
    for seed in range(WARM_STEPS + 4):
        recorded(step, batch(seed))
        want += batch(seed).images_BCHW.sum(0)
    assert torch.equal(step.total, want) and recorded.graph.replays == 4


def test_a_batch_of_another_shape_is_an_error():
    recorded, step = on_a_cpu(Recorded(GRAPH)), Summing()
    recorded(step, batch())
    with pytest.raises(EngineError, match="images_BCHW differs from the recorded step's .* engine.capture=off"):
        recorded(step, batch(count=3))
    packed = Batch(**{**vars(batch()), "subject_B": batch().slot_B})
    with pytest.raises(EngineError, match="subject_B differs"):
        recorded(step, packed)


def test_auto_goes_on_one_by_one_where_recording_fails_and_says_so_once():
    step = Summing()
    recorded = on_a_cpu(Recorded(Eager(Capture("graph", "auto", True))), fail="operation not permitted\nmore")
    for seed in range(WARM_STEPS):
        recorded(step, batch(seed))
    with pytest.warns(UserWarning, match="auto runs steps one by one, because recording failed: operation not"):
        recorded(step, batch(8))
    recorded(step, batch(9))
    assert step.runs == WARM_STEPS + 2 and recorded.graph is None
    assert recorded.choice[:2] == ("off", "auto: recording failed: operation not permitted")


def test_a_graph_that_was_asked_for_and_fails_is_an_error():
    recorded, step = on_a_cpu(Recorded(GRAPH), fail="no"), Summing()
    for seed in range(WARM_STEPS):
        recorded(step, batch(seed))
    with pytest.raises(EngineError, match="recording failed: no; use engine.capture=off"):
        recorded(step, batch(8))


@pytest.mark.parametrize(
    "mode, kinds",
    [("off", [Eager]), ("compile", [Compiled]), ("graph", [Recorded, Eager]), ("compiled_graph", [Recorded, Compiled])],
)
def test_each_mode_has_its_runner(mode, kinds):
    runner = make_runner(Capture(mode, "why"), torch.nn.Linear(1, 1), ())
    inner = [runner.inner] if isinstance(runner, Recorded) else []
    assert [type(one) for one in (runner, *inner)] == kinds and runner.choice == Capture(mode, "why")


def test_off_is_the_step_as_it_is():
    step = Summing()
    make_runner(Capture("off", ""), torch.nn.Linear(1, 1), ())(step, batch())
    assert step.runs == 1 and torch.equal(step.total, batch().images_BCHW.sum(0))


class ResnetBlock2D(torch.nn.Module):
    """Bears the name of a block that is compiled."""

    def __init__(self, side):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, side))

    def forward(self, x):
        return x @ self.weight.mT


def test_compiling_begins_after_the_first_step_and_pauses_for_pictures():
    blocks = torch.nn.ModuleList([ResnetBlock2D(2)])
    runner, seen = Compiled(Capture("compile", ""), blocks, ["ResnetBlock2D"]), []
    for _ in range(3):
        runner(lambda _: seen.append(blocks[0]._compiled_call_impl is not None), batch())
    assert seen == [False, True, True]
    was = blocks[0]._compiled_call_impl
    with as_python(blocks):
        assert blocks[0]._compiled_call_impl is None
    assert blocks[0]._compiled_call_impl is was
    release(blocks)
    assert blocks[0]._compiled_call_impl is None


def test_what_is_recorded_is_compiled_before():
    blocks, seen = torch.nn.ModuleList([ResnetBlock2D(2)]), []
    recorded = on_a_cpu(make_runner(Capture("compiled_graph", "asked for"), blocks, ["ResnetBlock2D"]))
    for _ in range(WARM_STEPS + 2):
        recorded(lambda _: seen.append(blocks[0]._compiled_call_impl is not None), batch())
    assert seen == [False] + [True] * (WARM_STEPS + 1) and recorded.graph.replays == 2


@pytest.mark.parametrize("old", [False, True])
@torch._dynamo.config.patch(recompile_limit=8)
def test_blocks_of_many_shapes_are_all_compiled(old, monkeypatch):
    """SD1.5's residual blocks come in 14 sets of shapes; PyTorch gives up after 8 unless it is told. old: as before
    2.13, where `torch.compile` takes no limit."""
    if old:
        monkeypatch.setattr(capture, "inspect", SimpleNamespace(signature=lambda _: SimpleNamespace(parameters={})))
    elif "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("needs torch 2.13")
    blocks = torch.nn.ModuleList([ResnetBlock2D(side) for side in range(1, 13)])
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]  # A reset keeps the counts of the tests that ran before.
    compile_regions(blocks, ["ResnetBlock2D"], "aot_eager")
    for side, block in enumerate(blocks, 1):
        block(torch.ones(2, side))
    assert counts["unique_graphs"] - before == len(blocks)


@pytest.fixture(scope="module")
def denoiser(model_folders):
    from dbtrain.families import FAMILIES
    from dbtrain.models.load import load_models
    from dbtrain.settings.config import ModelConfig

    return load_models(FAMILIES["sd"], ModelConfig(path=str(model_folders["sd"]))).denoiser


def predict(denoiser):
    device = denoiser.device
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    out = denoiser(x, torch.tensor([10, 700], device=device), torch.ones(2, 7, 32, device=device)).sample
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


COMPILERS = [("aot_eager", "cpu"), pytest.param("inductor", "cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("backend, device", COMPILERS)
def test_compiled_blocks_compute_what_the_blocks_do(denoiser, backend, device, monkeypatch):
    """With inductor, g++ would take minutes on a CPU. cuDNN rounds to TF32 unless told otherwise, as training does."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    denoiser.to(device)
    want = predict(denoiser)
    torch._dynamo.reset()
    regions = ("BasicTransformerBlock", "ResnetBlock2D")
    assert compile_regions(denoiser, regions, backend) == sum(
        type(block).__name__ in regions for block in denoiser.modules()
    )
    got = predict(denoiser)
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] > 0 and not counted["graph_break"]
    release(denoiser)
    # Other orders of float32 sums through some twenty layers.
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(predict(denoiser), want))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", GRAPHS)
def test_a_recorded_step_is_the_step(mode):
    plain, recorded = Summing("cuda"), Summing("cuda")
    replayed = make_runner(Capture(mode, "asked for"), torch.nn.Linear(1, 1), ())
    for seed in range(WARM_STEPS + 5):
        plain(batch(seed, device="cuda"))
        replayed(recorded, batch(seed, device="cuda"))
    assert replayed.graph is not None and recorded.runs == WARM_STEPS + 1
    assert torch.equal(plain.total, recorded.total)
