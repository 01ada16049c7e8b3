"""A whole training step of a pack, in every way that this machine can run it, interleaved: times, memory, FLOPs, MFU.

Samples are random and rows train with a learning rate of 0, so nothing is learnt and every step is alike. The ceiling
of FLOP/s is a matrix product measured in the same run, in the compute precision.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dbtrain.batch import Batch
from dbtrain.bench.operators import Operators
from dbtrain.bench.pack import load
from dbtrain.config import RunConfig
from dbtrain.engines.capture import WARM_STEPS, release
from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.families.attention import engage_attention
from dbtrain.packing.pack import Pack
from dbtrain.telemetry import peak_memory_gib


@dataclass(frozen=True)
class Plan:
    """What to compare, and how long. random: Stable Diffusion 1.5's shape."""

    captures: Sequence[str] = ("off",)
    attentions: Sequence[str] = ("sdpa",)
    sizes: Sequence[int] = (1,)
    steps: int = 5
    turns: int = 3
    random: bool = False


@dataclass
class Rig:
    """A pack with a batch for it, and the milliseconds of its steps."""

    name: dict[str, Any]
    pack: Pack
    batch: Batch
    taken_ms: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One training step, waited for."""
        self.pack.step(self.batch)
        if self.pack.device.startswith("cuda"):
            torch.cuda.synchronize()


def make_rig(config: RunConfig, size: int, random: bool = False) -> Rig:
    """A pack of random samples whose rows never end; raises ConfigError for a way that cannot be on this machine."""
    base = load(config, random)
    models, kind = base.models, torch.device(base.world.device).type
    if random:
        models.attention = engage_attention(models.denoiser, config.model.attention, kind, config.train.precision)
    family = FAMILIES[config.model.family]
    pack = Pack(family, models, config, size, config.lora.rank, config.train.steps, base.captions)
    pack.engine.live_N.fill_(True)
    pack.engine.end_N.fill_(2**62)
    name = {"capture": config.engine.capture, "attention": config.model.attention, "subjects": size}
    return Rig(name, pack, pack.rehearsal(base.shape))


def variant(config: RunConfig, capture: str, attention: str) -> RunConfig:
    """The configuration of a pack run one way."""
    engine = config.engine.model_copy(update={"kind": "packed", "capture": capture})
    model = config.model.model_copy(update={"attention": attention})
    return config.model_copy(update={"engine": engine, "model": model})


def measure(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """A row for each way that can be, with the reasons of those that cannot. Turns are interleaved."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    rigs, refused = [], []
    for size in plan.sizes:
        for capture in plan.captures:
            for attention in plan.attentions:
                try:
                    rigs.append(make_rig(variant(config, capture, attention), size, plan.random))
                except ConfigError as error:
                    refused.append({"capture": capture, "attention": attention, "why": str(error)})
    refused = [one for number, one in enumerate(refused) if one not in refused[:number]]
    top = ceiling_flop_per_s(device, config.train.precision)
    rows = [count(rig) for rig in rigs]
    for turn in range(plan.turns):
        for rig in rigs:
            for _ in range(WARM_STEPS + 1 if turn == 0 else 1):
                rig.step()
            rig.taken_ms += [timed(rig.step, rig.pack.device) for _ in range(plan.steps)]
    for rig, row in zip(rigs, rows):
        row |= summary(rig, row["flop"], top)
        release(rig.pack.models.denoiser)
    about = {"device": torch.cuda.get_device_name() if device != "cpu" else "cpu", "torch": torch.__version__}
    return {
        **about,
        "base": "random weights" if plan.random else config.model.path,
        "gemm_flop_per_s": top,
        "rows": rows,
        "refused": refused,
    }


def count(rig: Rig) -> dict[str, Any]:
    """Operators, casts and waits of a step as it is (before a graph or a compiler takes it), and its FLOPs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the layout of arenas, once a process
        rig.pack.advance(rig.batch)
        with Operators() as seen:
            rig.pack.advance(rig.batch)
        with FlopCounterMode(display=False) as flops:
            rig.pack.advance(rig.batch)
    attention = rig.pack.models.attention
    return {
        **rig.name,
        "runs": attention.name if attention else rig.name["attention"],
        "launches": seen.launches,
        "casts": seen.casts,
        "waits": dict(seen.waits),
        "flop": flops.get_total_flops(),
    }


def timed(step: Callable[[], None], device: str) -> float:
    """Milliseconds of one step: wall time on a GPU, processor time on a CPU, which others may be using too."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    begin = clock()
    step()
    return (clock() - begin) * 1e3


def summary(rig: Rig, flop: int, top: float) -> dict[str, Any]:
    """Quantiles, images and FLOPs a second, and the share of the measured ceiling (MFU)."""
    taken = rig.taken_ms if len(rig.taken_ms) > 1 else rig.taken_ms * 2
    low, *_, high = statistics.quantiles(taken, n=10, method="inclusive")
    median = statistics.median(rig.taken_ms)
    reached = flop / median * 1e3
    return {
        "ms": [low, median, high],
        "ms_a_subject": median / rig.pack.size,
        "images_per_s": len(rig.batch.slot_B) / median * 1e3,
        "flop_per_s": reached,
        "mfu": reached / top,
        "peak_gib": peak_memory_gib(rig.pack.device),
    }


def ceiling_flop_per_s(device: str, precision: str) -> float:
    """FLOP/s of a large matrix product in the compute precision; the best of a few."""
    side, dtype = (8192 if device != "cpu" else 1024), torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        if device != "cpu":
            torch.cuda.synchronize()

    product()
    return 2 * side**3 / min(timed(product, device) for _ in range(5)) * 1e3


def table(result: dict[str, Any]) -> str:
    """What `measure` found, for people."""
    lines = [
        f"{result['base']} on {result['device']}: matrix product {result['gemm_flop_per_s'] / 1e9:,.0f} GFLOP/s",
        "",
        "| subjects | capture | attention | launches | casts | waits | ms (10, 50, 90%) | a subject | images/s | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        spread = " ".join(f"{value:.1f}" for value in row["ms"])
        lines.append(
            f"| {row['subjects']} | {row['capture']} | {row['runs']} | {row['launches']:,} | {row['casts']:,} "
            f"| {sum(row['waits'].values())} | {spread} | {row['ms_a_subject']:.1f} | {row['images_per_s']:.2f} "
            f"| {row['mfu']:.0%} |"
        )
    lines += [f"not run: {one['capture']}, {one['attention']}: {one['why']}" for one in result["refused"]]
    return "\n".join(lines)
