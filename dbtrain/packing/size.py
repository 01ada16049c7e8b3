"""How many subjects a pack holds: the fastest size that fits, by memory and time of two sizes measured here."""

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
SECOND = (4, 2)
"""Sizes of the second probe; the first that surely fits is taken. Four tells a slope from noise better than two."""


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


def line(first: Probe, second: Probe, value: Callable[[Probe], float]) -> Callable[[int], float]:
    """A value (bytes, seconds) of packs of any size: the line through two probes. Both grow with the samples of a step,
    over what a step costs whatever its size."""
    slope = (value(second) - value(first)) / (second.size - first.size)
    return lambda size: value(first) + slope * (size - first.size)


def choose_size(probe: Callable[[int], Probe | None], settings: PackedConfig, free: int, most: int) -> tuple[int, str]:
    """(size, the reason in one line), by at most two probes: doubled while the lines through them say that memory
    allows it and a subject's step gets cheaper.

    probe: measures a size; None where memory ran out. free: bytes that there are. most: subjects that there are.
    """
    budget, ceiling = settings.memory_share * free, min(settings.largest, most)
    first = probe(1)
    if first is None:
        raise EngineError(
            f"engine.packed.size: a single subject does not fit {free / 2**30:.2f} GiB; "
            "lower train.batch or data.resolution, or set train.gradient_checkpointing=true"
        )
    end = "no more subjects" if most < settings.largest else "engine.packed.largest"
    # One subject's bytes times the size is more than a pack takes: the fixed part is counted again for each.
    sizes = [size for size in SECOND if size <= ceiling and size * first.bytes <= budget]
    if not sizes:
        needed = f"2 may need {2 * first.bytes / 2**30:.2f} of {budget / 2**30:.2f} GiB"
        return 1, f"1 subject a pack ({end if ceiling < 2 else needed})"
    second = probe(sizes[0])
    if second is None:
        return 1, f"1 subject a pack (memory ran out at {sizes[0]})"
    taken, seconds = (line(first, second, value) for value in (lambda one: one.bytes, lambda one: one.seconds))
    size = 1
    while size * 2 <= ceiling:
        if taken(size * 2) > budget:
            end = f"{size * 2} would need {taken(size * 2) / 2**30:.2f} of {budget / 2**30:.2f} GiB"
            break
        if seconds(size * 2) / 2 > GAIN * seconds(size):
            end = f"{size * 2} would be no faster"
            break
        size *= 2
    steps = ", ".join(f"{each.size}: {1e3 * each.seconds_a_subject:.1f} ms" for each in (first, second))
    return size, f"{size} subjects a pack ({end}; step of a subject at {steps})"


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
        torch.cuda.empty_cache()  # what PyTorch keeps for later, such as the class images' activations, is free too
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
