"""Attention is what was asked for, in every layer, by what really ran; or it is refused and nothing has changed."""

import sys

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from dbtrain.engines.unit_scale import restore_unit_divisions
from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models import attention
from dbtrain.models.adapters import attach
from dbtrain.models.architectures import class_of
from dbtrain.models.attention import (
    CORES,
    Attention,
    Fastest,
    Ran,
    Shape,
    attention_layers,
    engage_attention,
    fastest,
    measure,
    processor_of,
    prove,
)
from dbtrain.models.load import load_models
from dbtrain.settings.config import ModelConfig

SMALL = Shape("cpu", "float32", 2, 3, 16, 8, 8)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def denoiser(request, model_folders):
    family = FAMILIES[request.param]
    folder = model_folders[family.name]
    return load_models(family, ModelConfig(family=family.name, path=str(folder))).denoiser


def predict(denoiser):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    told = torch.randn(2, 7, denoiser.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.ones(2, 48), "time_ids": torch.ones(2, 6)}
    return denoiser(x, torch.tensor([10, 700]), told, added_cond_kwargs=added).sample


@pytest.mark.parametrize("choice, kernel", [("sdpa", "flash"), ("flash", "flash"), ("math", "math")])
def test_the_choice_is_what_runs_in_every_layer(denoiser, choice, kernel):
    """On a CPU, PyTorch's own pick is its FlashAttention for CPUs."""
    engaged = engage_attention(denoiser, choice, "cpu")
    assert engaged.name == choice and f"{kernel} ran in every kind of layer" in engaged.reason
    assert {type(one) for one in denoiser.attn_processors.values()} == {type(processor_of(choice))}
    with torch.no_grad(), Ran() as ran:
        predict(denoiser)
    assert ran.kernels == {kernel}


@torch.no_grad()
def test_all_of_them_agree(denoiser):
    outputs = []
    for choice in ("math", "sdpa", "flash"):
        engage_attention(denoiser, choice, "cpu")
        outputs.append(predict(denoiser))
    for other in outputs[1:]:  # float32 softmaxes in another order
        assert (outputs[0] - other).abs().max() < 1e-4 * outputs[0].abs().max()


def test_auto_on_a_cpu_is_sdpa_and_says_why(denoiser):
    engaged = engage_attention(denoiser, "auto", "cpu")
    assert engaged.row() == {"name": "sdpa", "reason": "auto: nothing else is meant for cpu"}
    assert {type(one) for one in denoiser.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize(
    "device, precision, choice, why",
    [
        ("cpu", "fp32", "xformers", r"needs a CUDA device, and this run is on cpu; use model\.attention=auto"),
        ("cuda", "fp32", "xformers", r"xformers is not installed; pip install"),
        ("cuda", "fp32", "flash", r"flash needs bf16 on a GPU; set train\.precision=bf16"),
        ("cuda", "fp32", "cudnn", r"cudnn needs bf16; set train\.precision=bf16"),
        ("cpu", "bf16", "cudnn", r"cudnn needs a CUDA device, and this run is on cpu"),
    ],
)
def test_the_impossible_is_refused_and_changes_nothing(denoiser, device, precision, choice, why, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    attention.xformers_problem.cache_clear()
    engage_attention(denoiser, "math", "cpu")
    with pytest.raises(ConfigError, match=rf"model\.attention: .*{why}"):
        engage_attention(denoiser, choice, device, precision)
    assert {type(one) for one in denoiser.attn_processors.values()} == {AttnProcessor}


@pytest.fixture
def broken_xformers(tmp_path, monkeypatch):
    """An installed xformers whose binary part does not fit: it raises when it is imported."""
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers/__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    attention.xformers_problem.cache_clear()
    yield
    attention.xformers_problem.cache_clear()


@pytest.mark.usefixtures("broken_xformers")
def test_an_xformers_that_does_not_load_is_told_as_that(denoiser):
    """diffusers imports an installed xformers with every model, so no choice of attention helps."""
    why = r"xformers is installed but does not load \(OSError: undefined symbol: _ZN3c10\); uninstall it"
    with pytest.raises(ConfigError, match=rf"model\.attention: {why}"):
        engage_attention(denoiser, "xformers", "cuda", "bf16")
    with pytest.raises(ConfigError, match=f"diffusers cannot load its models here.*: {why}"):
        class_of("diffusers:UNet2DConditionModel")
    assert class_of("transformers:CLIPTextModel")


def test_a_setter_that_does_nothing_is_found_out(denoiser, monkeypatch):
    """diffusers' `set_attention_backend("xformers")` on these U-Nets is such a one."""
    engage_attention(denoiser, "sdpa", "cpu")
    monkeypatch.setattr(type(denoiser), "set_attn_processor", lambda self, processor: None)
    with pytest.raises(ConfigError, match="asked for math, but flash runs in AttnProcessor2_0"):
        engage_attention(denoiser, "math", "cpu")


def test_one_layer_that_differs_is_found_out(denoiser):
    engage_attention(denoiser, "sdpa", "cpu")
    layer = list(attention_layers(denoiser).values())[-1]
    layer.processor = AttnProcessor()
    assert prove(denoiser, "sdpa", "cpu", torch.float32) == {"flash", "math"}
    with pytest.raises(ConfigError, match="math runs in AttnProcessor"):
        prove(denoiser, "flash", "cpu", torch.float32)


def test_a_kernel_that_cannot_run_gives_its_reason(denoiser, monkeypatch):
    """A CPU has no memory-efficient attention; a GPU has no FlashAttention for wide heads."""
    real = attention.sdpa_kernel
    monkeypatch.setattr(attention, "sdpa_kernel", lambda _: real(attention.SDPBackend.EFFICIENT_ATTENTION))
    with pytest.raises(ConfigError, match="flash cannot run .* heads of .* on cpu: .*; use model.attention=auto"):
        engage_attention(denoiser, "flash", "cpu")


@pytest.fixture
def transformer():
    """A transformer of one block."""
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
              "joint_attention_dim": 16, "pooled_projection_dim": 16, "sample_size": 16, "in_channels": 4}  # fmt: skip
    return SD3Transformer2DModel(**config, pos_embed_max_size=8)


@pytest.mark.parametrize(
    "device, precision, choice, why",
    [
        ("cuda", "bf16", "xformers", "xformers is for the U-Nets of .*, got SD3Transformer2DModel; use flash, cudnn"),
        ("cuda", "fp32", "flash", "flash needs bf16 on a GPU"),
        ("cpu", "bf16", "cudnn", "cudnn needs a CUDA device, and this run is on cpu"),
    ],
)
def test_a_transformer_refuses_the_impossible_and_keeps_what_it_had(transformer, device, precision, choice, why):
    engage_attention(transformer, "math", "cpu")
    before = [layer.processor for layer in attention_layers(transformer).values()]
    with pytest.raises(ConfigError, match=rf"model\.attention: {why}"):
        engage_attention(transformer, choice, device, precision)
    assert [layer.processor for layer in attention_layers(transformer).values()] == before


def test_a_transformers_choice_is_held_against_what_runs(transformer, monkeypatch):
    """Another backend than was asked for, and one that the device lacks."""
    x, told, pooled = torch.randn(1, 4, 16, 16), torch.randn(1, 3, 16), torch.randn(1, 16)

    def look(choice):
        engaged = engage_attention(transformer, choice, "cpu")
        with torch.no_grad(), engaged.watched():
            transformer(x, told, pooled, torch.tensor([500]))
        return engaged.row()

    assert look("math")["ran"] == ["math"] and look("sdpa") == {
        "name": "sdpa", "reason": "sdpa: its own processors call PyTorch's own pick", "ran": ["flash"],
    }  # fmt: skip
    monkeypatch.setitem(attention.BACKENDS, "flash", attention.SDPBackend.MATH)
    with pytest.raises(ConfigError, match="model.attention: asked for flash, but math runs; use model.attention=auto"):
        look("flash")
    monkeypatch.setitem(attention.BACKENDS, "flash", attention.SDPBackend.EFFICIENT_ATTENTION)
    with pytest.raises(ConfigError, match="model.attention: flash cannot run here: .*; use model.attention=auto"):
        look("flash")


DEVICES = {"sdpa": "cpu", "flash": "cpu", "cudnn": "cuda", "xformers": "cuda"}


@pytest.mark.parametrize(
    "name", [name if DEVICES[name] == "cpu" else pytest.param(name, marks=pytest.mark.gpu) for name in CORES]
)
def test_each_core_is_attention(name):
    if name == "xformers":
        pytest.importorskip("xformers.ops")
    dtype = torch.float64 if DEVICES[name] == "cpu" else torch.bfloat16
    close = {torch.float64: 1e-12, torch.bfloat16: 2**-6}[dtype]
    q, k, v = (torch.randn(2, n, 3, 8, dtype=dtype, device=DEVICES[name], requires_grad=True) for n in (16, 8, 8))
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8**0.5, -1)
    want = torch.einsum("bhqk,bkhd->bqhd", weights, v.double())
    assert torch.allclose(CORES[name](q, k, v).double(), want, rtol=close, atol=close)


def test_the_fastest_wins_at_each_shape_and_is_measured_once(monkeypatch):
    monkeypatch.setattr(attention, "MEASURED", {})
    asked = []
    monkeypatch.setattr(
        attention, "measure", lambda core, shape: asked.append(shape) or (1.0 if core is CORES["flash"] else 2.0)
    )
    assert fastest(["sdpa", "flash"], SMALL) == fastest(["sdpa", "flash"], SMALL) == "flash"
    assert asked == [SMALL, SMALL]  # once for each name


def test_a_measurement_takes_time_and_leaves_no_gradient():
    assert 0 < measure(CORES["sdpa"], SMALL, warm=0, turns=1) < 1e4


@torch.no_grad()
def test_a_measured_choice_is_made_by_the_shapes_of_the_pass(denoiser, monkeypatch):
    """What `auto` does on a GPU, with the candidates of a CPU."""
    monkeypatch.setattr(attention, "MEASURED", {})
    engage_attention(denoiser, "sdpa", "cpu")
    want = predict(denoiser)
    engaged = Attention("auto", "test")
    denoiser.set_attn_processor(Fastest(["sdpa", "flash"], engaged))
    got = predict(denoiser)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert {shape.keys for shape in engaged.shapes} > {7} and set(engaged.shapes.values()) <= {"sdpa", "flash"}
    assert all(row["ms"].keys() == {"sdpa", "flash"} for row in engaged.row()["shapes"])


def test_a_measured_choice_compiles_without_a_graph_break(model_folders, monkeypatch):
    """As `engine.capture=compile` with `model.attention=auto`, a GPU's default, runs it after a first step."""
    monkeypatch.setattr(attention, "MEASURED", {})
    model = load_models(FAMILIES["sd"], ModelConfig(path=str(model_folders["sd"]))).denoiser
    model.set_attn_processor(Fastest(["sdpa", "flash"], Attention("auto", "test")))
    want = predict(model)
    restore_unit_divisions(model)  # as `compile_regions` does
    blocks = [block for block in model.modules() if type(block).__name__ == "BasicTransformerBlock"]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    assert blocks and torch.equal(predict(model), want)


def test_the_kernels_of_the_first_real_step_are_recorded(denoiser):
    engaged = engage_attention(denoiser, "sdpa", "cpu")
    assert "ran" not in engaged.row()
    with torch.no_grad(), engaged.watched():
        predict(denoiser)
    assert engaged.row()["ran"] == ["flash"]
    engage_attention(denoiser, "math", "cpu")
    with torch.no_grad(), engaged.watched():  # a later step is not looked at
        predict(denoiser)
    assert engaged.ran == {"flash"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_choice_is_measured_in_the_midst_of_training_an_adapter(model_folders, monkeypatch, checkpointing):
    """The first step of `auto` on a GPU: layers that carry adapters, blocks that are recomputed in backward."""
    monkeypatch.setattr(attention, "MEASURED", {})
    grads = []
    for names in (["sdpa"], ["sdpa", "flash"]):
        model = load_models(FAMILIES["sd"], ModelConfig(path=str(model_folders["sd"]))).denoiser
        adapters = attach(model, ["attn*.to_q", "attn*.to_v"], 1, 2, 2.0)
        for layer in adapters:
            nn.init.constant_(layer.down_NRD, 0.1)
        if checkpointing:
            model.enable_gradient_checkpointing()
            model.train()
        engaged = Attention("auto", "test")
        model.set_attn_processor(Fastest(names, engaged))
        predict(model).square().sum().backward()
        assert engaged.shapes
        grads.append([layer.up_NDR.grad for layer in adapters])
    for one, other in zip(*grads):
        assert one.abs().max() > 0 and torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["auto", "sdpa", "flash", "cudnn", "xformers", "math"])
def test_on_a_gpu_the_choice_runs_forward_and_backward_in_bf16(choice, model_folders):
    if choice == "xformers":
        pytest.importorskip("xformers.ops")
    model = load_models(FAMILIES["sd"], ModelConfig(path=str(model_folders["sd"]))).denoiser.to("cuda", torch.bfloat16)
    engaged = engage_attention(model, choice, "cuda", "bf16")
    x = torch.randn(2, 4, 16, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    told = torch.randn(2, 7, 32, device="cuda", dtype=torch.bfloat16)
    with Ran() as ran:
        model(x, torch.tensor([10, 700], device="cuda"), told).sample.sum().backward()
    assert ran.kernels and x.grad.isfinite().all()
    if choice == "auto":
        assert engaged.shapes and all(row["ms"] for row in engaged.row()["shapes"])
    else:
        assert ran.kernels <= attention.MAY_RUN[choice]
