"""The size of a pack is a pure function of what was measured; and the measurement counts what autograd keeps."""

import pytest
import torch

from dbtrain.engines.world import World
from dbtrain.errors import EngineError
from dbtrain.models.adapters import layers
from dbtrain.packing.size import Probe, choose_size, free_bytes, line, measured_size, sample_shape, used_bytes
from dbtrain.settings.config import PackedConfig
from dbtrain.training.session import Base, Watch
from tests.kit.main_job import small_config

MIB = 2**20


def machine(base: int, slope: int, seconds: dict[int, float], seen: list[int]):
    def probe(size):
        seen.append(size)
        if seconds[size] is None:
            return None
        return Probe(size, (base + slope * size) * MIB, seconds[size])

    return probe


def test_a_gpus_free_memory_includes_what_pytorch_keeps_for_later(monkeypatch):
    """The class images' activations are in PyTorch's cache, which CUDA takes for used memory."""
    cached = [300]
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000 - sum(cached), 1000))
    assert free_bytes("cuda:0") == 1000


def test_the_line_goes_through_both_probes():
    taken = line(Probe(1, 150, 1.0), Probe(4, 300, 1.0), lambda probe: probe.bytes)
    assert [taken(size) for size in (1, 2, 4, 8)] == [150, 200, 300, 500]


@pytest.mark.parametrize(
    "free, most, seconds, size, probed, reason",
    [
        (10_000, 64, {1: 1, 4: 2.8}, 16, [1, 4], "32 would be no faster"),  # 0.4 + 0.6 N seconds
        (10_000, 64, {1: 1, 4: 1.003}, 64, [1, 4], "engine.packed.largest"),
        (2_000, 64, {1: 1, 4: 1.1}, 8, [1, 4], "16 would need 1.66 of 1.56 GiB"),
        (10_000, 3, {1: 1, 2: 1.1}, 2, [1, 2], "no more subjects"),
        (10_000, 1, {1: 1}, 1, [1], "no more subjects"),
        (10_000, 64, {1: 1, 4: 4.1}, 1, [1, 4], "2 would be no faster"),
        (600, 64, {1: 1, 2: 1.1}, 2, [1, 2], "4 would need 0.49 of 0.47 GiB"),
        (400, 64, {1: 1}, 1, [1], "2 may need 0.39 of 0.31 GiB"),
        (10_000, 64, {1: 1, 4: None}, 1, [1, 4], "memory ran out at 4"),
    ],
)
def test_two_probes_choose_a_size_for_one_reason_which_is_told(free, most, seconds, size, probed, reason):
    """100 MiB and 100 more a subject; four fifths of the free memory may be used."""
    seen: list[int] = []
    got, why = choose_size(machine(100, 100, seconds, seen), PackedConfig(), free * MIB, most)
    assert (got, seen) == (size, probed), why
    assert reason in why and "\n" not in why


def test_one_subject_that_does_not_fit_is_an_error_with_remedies():
    with pytest.raises(EngineError, match=r"a single subject does not fit 0\.10 GiB; lower train\.batch"):
        choose_size(machine(1, 1, {1: None}, []), PackedConfig(), 100 * MIB, 64)


def test_a_ceiling_holds():
    seen: list[int] = []
    size, why = choose_size(
        machine(1, 1, dict.fromkeys((1, 2, 4, 8), 1.0), seen), PackedConfig(largest=4), 10_000 * MIB, 64
    )
    assert size == 4 and "engine.packed.largest" in why


def test_kept_bytes_are_counted_once_and_grow_with_the_batch():
    weight = torch.randn(100, 100, requires_grad=True)

    def bytes_of(rows):
        with used_bytes("cpu") as used:
            x = torch.randn(rows, 100)
            ((x @ weight).tanh().square() + 0 * x).sum().backward()
        return used[0]

    # x, and tanh's result, which square keeps too; the weight is not needed: x wants no gradient.
    assert bytes_of(50) == 2 * 50 * 400
    assert bytes_of(100) == 2 * bytes_of(50)
    assert free_bytes("cpu") > MIB


def test_a_size_is_measured_on_the_base_and_leaves_it_as_it_was(capsys):
    base = Base.load(small_config("engine.kind=packed"), World(0, 1, "cpu"))
    wide = base.settings.model_copy(update={"lora": base.settings.lora.model_copy(update={"rank": 5})})
    assert measured_size(base, Watch(), [base.settings, wide], 2) in (1, 2)
    assert "engine.packed.size: auto: " in capsys.readouterr().err
    assert not layers(base.models.denoiser)


@pytest.mark.parametrize(
    "words, shape",
    [((), (8, 16, 16)), (("data.cache_latents=false",), (3, 32, 32)), (("data.crop=random",), (3, 32, 32))],
)
def test_a_rehearsal_has_the_shape_of_what_banks_give(words, shape):
    assert sample_shape(Base.load(small_config(*words), World(0, 1, "cpu"))) == shape
