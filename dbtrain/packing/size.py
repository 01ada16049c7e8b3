"""How many subjects a pack holds: the fastest size that fits, of sizes whose memory and time were measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dbtrain.errors import EngineError
from dbtrain.packing.pack import CAPTIONS, make_pack
from dbtrain.settings.config import PackedConfig, RunConfig
from dbtrain.training.session import Base, Watch

GAIN = 0.97
"""A pack of twice the size is worth it if a subject's step takes less than this share of the time."""


@dataclass(frozen=True)
class Probe:
    """One measured step of a pack: its size, the bytes that it took beyond the base, the seconds of one step."""

    size: int
    bytes: int
    seconds: float

    @property
    def seconds_a_subject(self) -> float:
        """Seconds of a step divided by the subjects it trained."""
        return self.seconds / self.size


def fit(probes: Sequence[Probe]) -> tuple[float, float]:
    """(a, b) of bytes = a + b * size, through the first and the last probe."""
    first, last = probes[0], probes[-1]
    slope = (last.bytes - first.bytes) / (last.size - first.size)
    return first.bytes - slope * first.size, slope


def expected_bytes(probes: Sequence[Probe], size: int) -> float:
    """Bytes that a pack of a size will take: by the line through the probes, or in proportion if there is one probe."""
    if len(probes) == 1:
        return probes[0].bytes * size / probes[0].size
    start, slope = fit(probes)
    return start + slope * size


def choose_size(probe: Callable[[int], Probe | None], settings: PackedConfig, free: int, most: int) -> tuple[int, str]:
    """(size, the reason in one line): doubled while memory allows it and a subject's step gets cheaper.

    probe: measures a size; None where memory ran out. free: bytes that there are. most: subjects that there are.
    """
    budget, ceiling = settings.memory_share * free, min(settings.largest, most)
    first = probe(1)
    if first is None:
        raise EngineError(
            f"engine.packed.size: a single subject does not fit {free / 2**30:.2f} GiB; "
            "lower train.batch or data.resolution, or set train.gradient_checkpointing=true"
        )
    probes = [first]
    why = "no more subjects" if most < settings.largest else "engine.packed.largest"
    while probes[-1].size * 2 <= ceiling:
        size = probes[-1].size * 2
        if (wanted := expected_bytes(probes, size)) > budget:
            why = f"{size} would need {wanted / 2**30:.2f} of {budget / 2**30:.2f} GiB"
            break
        measured = probe(size)
        if measured is None:
            why = f"memory ran out at {size}"
            break
        probes.append(measured)
        if probes[-1].seconds_a_subject > GAIN * probes[-2].seconds_a_subject:
            why = f"{size} was no faster"
            break
    best = min(probes, key=lambda each: each.seconds_a_subject)
    steps = ", ".join(f"{each.size}: {1e3 * each.seconds_a_subject:.1f} ms" for each in probes)
    return best.size, f"{best.size} subjects a pack ({why}; step of a subject at {steps})"


def measured_size(
    base: Base, watch: Watch, configs: Sequence[RunConfig], most: int, room: int = CAPTIONS
) -> int:
    """Rows of the fastest pack that fits this machine. configs: of subjects that it must hold, such as the largest one.
    most: subjects that there are. room: most captions of a subject. The base must carry no adapters, and carries none
    afterwards.
    """
    device = base.world.device

    def probe(size: int) -> Probe | None:
        return measure(base, configs, size, room)

    size, why = choose_size(probe, base.settings.engine.packed, free_bytes(device), most)
    watch.say(f"engine.packed.size: auto: {why}")
    return size


def measure(base: Base, configs: Sequence[RunConfig], size: int, room: int = CAPTIONS) -> Probe | None:
    """Memory and time of a pack's step, on random samples of the shapes of training; None where memory ran out."""
    device = base.world.device
    try:
        with used_bytes(device) as used:
            pack = make_pack(base, configs, size, room)
            batch = pack.rehearsal(sample_shape(base))
            for _ in range(pack.warm_steps):
                pack.step(batch)
        return Probe(size, used[0], timed(lambda: pack.step(batch), device))
    except torch.OutOfMemoryError:
        return None
    finally:
        # A pack is in no circle of references, so nothing of it is left when the next one is measured.
        base.restore()


@torch.no_grad()
def sample_shape(base: Base) -> torch.Size:
    """Shape of a sample as the banks give it: VAE moments, or pixels where they are encoded anew each step."""
    data = base.settings.data
    pixels = torch.zeros(1, 3, data.resolution, data.resolution, device=base.world.device)
    cached = data.cache_latents and data.crop == "center"
    return (base.family.codec.encode(base.models.vae, pixels) if cached else pixels).shape[1:]


@contextmanager
def used_bytes(device: str) -> Iterator[list[int]]:
    """A list that holds, after the block, the bytes that the block took at its peak. On a GPU these are what the
    allocator counted; on a CPU they are what autograd kept for backward, which is nearly all."""
    used: list[int] = []
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield used
        torch.cuda.synchronize()
        used.append(torch.cuda.max_memory_allocated() - before)
        return
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield used
    used.append(sum(kept.values()))


def free_bytes(device: str) -> int:
    """Memory that is free now, of the GPU or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return kib * 1024


def timed(step: Callable[[], None], device: str, turns: int = 2) -> float:
    """Seconds of the fastest of some steps."""
    seconds = []
    for _ in range(turns):
        begun = time.perf_counter()
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
