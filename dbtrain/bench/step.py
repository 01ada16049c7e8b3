"""A whole training step of a pack, in every way that this machine can run it, interleaved: times, memory, FLOPs, MFU.

Samples are random, and what is learnt is thrown away. The ceiling of FLOP/s is a matrix product measured in the same
run, in the compute precision; FLOPs are counted once for all ways.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dbtrain.bench import Say, origin, to_nobody
from dbtrain.bench.flops import count_flops
from dbtrain.bench.operators import Operators
from dbtrain.bench.pack import Base, Rig, ceiling_flop_per_s, load, packed, timed
from dbtrain.engines.capture import as_python, choose_capture
from dbtrain.engines.loss_scale import resolved_precision
from dbtrain.errors import ConfigError, EngineError, first_line
from dbtrain.models.attention import CANDIDATES, engage_attention
from dbtrain.packing.size import used_bytes
from dbtrain.settings.config import RunConfig


@dataclass(frozen=True)
class Plan:
    """What to compare, and how long. random: weights of the published shape of the recipe's family."""

    captures: Sequence[str] = ("off",)
    attentions: Sequence[str] = ("sdpa",)
    sizes: Sequence[int] = (1,)
    steps: int = 5
    turns: int = 3
    random: bool = False


@dataclass
class Way:
    """One way to run a step, and what was measured of it. settings: the recipe, changed to that way."""

    size: int
    settings: RunConfig
    taken_ms: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> dict[str, Any]:
        """The way in a row's words."""
        settings = self.settings
        return {"capture": settings.engine.capture, "attention": settings.model.attention, "subjects": self.size}


def variant(config: RunConfig, capture: str, attention: str) -> RunConfig:
    """The configuration of a pack run one way."""
    engine = config.engine.model_copy(update={"kind": "packed", "capture": capture})
    model = config.model.model_copy(update={"attention": attention})
    return config.model_copy(update={"engine": engine, "model": model})


def measure(config: RunConfig, plan: Plan, say: Say = to_nobody) -> dict[str, Any]:
    """A row for each way that can be, with the reasons of those that cannot. Turns are interleaved, on one base that
    each way's pack is put on and taken off again, so that they share its memory. say: gets each turn."""
    base = load(config, plan.random)
    device = base.world.device
    config = resolved_precision(config, torch.device(device).type)
    ways = [
        Way(size, variant(config, capture, attention))
        for size in plan.sizes
        for capture in plan.captures
        for attention in plan.attentions
    ]
    refused: dict[tuple[str, ...], dict[str, Any]] = {}  # a way once, at whatever size
    for turn in range(plan.turns):
        for way in list(ways):
            try:
                take_turn(way, base, plan.steps, first=turn == 0)
                say({**way.name, **way.facts, "turn": turn, "ms": way.taken_ms[-plan.steps :]})
            except (ConfigError, EngineError, torch.OutOfMemoryError) as error:
                ways.remove(way)
                row = {**way.name, "why": first_line(error)}
                refused.setdefault((row["capture"], row["attention"], row["why"]), row)
                say(row)
    top = ceiling_flop_per_s(device, config.train.precision)
    flops = {size: flops_of(base, config, size) for size in {way.size for way in ways}}
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        **origin(),
        "base": base.models.source,
        "gemm_flop_per_s": top,
        "rows": [{**way.name, **way.facts, **summary(way, flops[way.size], top)} for way in ways],
        "refused": list(refused.values()),
    }


def take_turn(way: Way, base: Base, steps: int, first: bool) -> None:
    """Time some steps of a way; at first also count its operators. Raises ConfigError where it cannot be."""
    models, device = base.models, base.world.device
    kind = torch.device(device).type
    choose_capture(way.settings.engine, kind)
    attention = engage_attention(models.denoiser, way.settings.model.attention, kind, way.settings.train.precision)
    if first:
        with used_bytes(device) as used, packed(base, way.settings, way.size) as rig:
            way.facts = count(rig)
        way.facts["peak_bytes"] = used[0]
        del rig  # else its recorded step would keep its memory while the next pack is built
    with packed(base, way.settings, way.size) as rig:
        way.taken_ms += [1e3 * timed(rig.step, 1, device)[1] for _ in range(steps)]
        way.facts["capture"] = rig.pack.runner.choice.mode  # what ran, where `auto` was asked for
    way.facts |= {"runs": attention.name, "shapes": attention.row().get("shapes", [])}


def flops_of(base: Base, config: RunConfig, size: int) -> int:
    """FLOPs of a pack's step, the same for every way to run it."""
    kind = torch.device(base.world.device).type
    engage_attention(base.models.denoiser, "sdpa", kind, config.train.precision)
    with packed(base, variant(config, "off", "sdpa"), size) as rig:
        return count_flops(lambda: rig.pack.advance(rig.batch))


def count(rig: Rig) -> dict[str, Any]:
    """Operators, casts and waits of a step as it is, before a graph or a compiler takes it."""
    with as_python(rig.pack.models.denoiser), Operators() as seen:
        rig.pack.advance(rig.batch)
    return {"launches": seen.launches, "casts": seen.casts, "waits": dict(seen.waits)}


def summary(way: Way, flop: int, top: float) -> dict[str, Any]:
    """Quantiles, images and FLOPs a second, and the share of the measured ceiling (MFU)."""
    taken = way.taken_ms if len(way.taken_ms) > 1 else way.taken_ms * 2
    low, *_, high = statistics.quantiles(taken, n=10, method="inclusive")
    median = statistics.median(way.taken_ms)
    roles = 2 if way.settings.prior.weight > 0 else 1
    return {
        "flop": flop,
        "ms": [low, median, high],
        "ms_a_subject": median / way.size,
        "images_per_s": way.size * roles * way.settings.train.batch / median * 1e3,
        "flop_per_s": flop / median * 1e3,
        "mfu": flop / median * 1e3 / top,
    }


def table(result: dict[str, Any]) -> str:
    """What `measure` found, for people."""
    lines = [
        f"{result['base']} on {result['device']}: matrix product {result['gemm_flop_per_s'] / 1e9:,.0f} GFLOP/s",
        "",
        "| subjects | capture | attention | launches | casts | waits | ms (10, 50, 90%) | each | img/s | MFU | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        spread = " ".join(f"{value:.1f}" for value in row["ms"])
        lines.append(
            f"| {row['subjects']} | {row['capture']} | {row['runs']} | {row['launches']:,} | {row['casts']:,} "
            f"| {sum(row['waits'].values())} | {spread} | {row['ms_a_subject']:.1f} | {row['images_per_s']:.2f} "
            f"| {row['mfu']:.0%} | {row['peak_bytes'] / 2**20:,.0f} |"
        )
    shapes = {str(one): one for row in result["rows"] for one in row["shapes"]}
    if shapes:
        names = " | ".join(CANDIDATES)
        lines += ["", f"| attention at | {names} | chosen |", "|---" * (len(CANDIDATES) + 2) + "|"]
        for one in shapes.values():
            sides = "{batch}x{heads}x{queries}x{width} on {keys} keys, {dtype}".format(**one)
            cells = (f"{one['ms'][name]:.4f} ms" if name in one["ms"] else "" for name in CANDIDATES)
            lines.append(f"| {sides} | " + " | ".join(cells) + f" | {one['chosen']} |")
    lines += [f"not run: {one['capture']}, {one['attention']}: {one['why']}" for one in result["refused"]]
    return "\n".join(lines)
