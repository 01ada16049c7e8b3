"""`dbtrain bench pack`: what a subject's step costs alone and in packs of several sizes, in turns, on this machine.

Processor seconds are compared (device seconds on a GPU), because wall time moves with whatever else runs here. A turn
attaches each contestant's adapters anew to the one base, warms it up and times a few steps.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dbtrain.bench import Say, origin, to_nobody
from dbtrain.bench.flops import count_flops
from dbtrain.engines.capture import release
from dbtrain.engines.engine import plan_batches
from dbtrain.engines.loss_scale import DTYPES, resolved_precision
from dbtrain.engines.world import World, start_world
from dbtrain.engines.zero import ZeroEngine
from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import detach
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Family, Models, low_side
from dbtrain.models.forms import fuse, lay_out
from dbtrain.objective.noise import discrete_schedule
from dbtrain.packing.pack import Pack, tensors_of
from dbtrain.packing.size import used_bytes
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import write_file
from dbtrain.tiny import DEMO
from dbtrain.training import session
from dbtrain.training.step import TrainingStep
from dbtrain.training.trainables import make_trainable
from dbtrain.values import Batch, Conditioning


@dataclass(frozen=True)
class Plan:
    """What to compare. steps: timed in a turn. processes: independent ones at once, 0 for none. subjects: counts for
    the line T(S). random_weights: in the published shape of the recipe's family, instead of the recipe's base."""

    sizes: Sequence[int]
    steps: int = 3
    turns: int = 3
    processes: int = 0
    subjects: Sequence[int] = ()
    random_weights: bool = False


@dataclass(frozen=True)
class Base:
    """A base on its device, captions for it, and the shape of a sample's moments."""

    models: Models
    captions: Conditioning
    shape: tuple[int, ...]
    world: World


def load(config: RunConfig, random_weights: bool) -> Base:
    """The recipe's base, or random weights in the published shape of its family (SD 1.5's or XL's)."""
    world, side = start_world(), config.data.resolution // 8
    config = resolved_precision(config, torch.device(world.device).type)
    draw = torch.Generator().manual_seed(0)
    if not random_weights:
        models, family = session.Base.load(config, world).models, FAMILIES[config.model.family]
        with torch.no_grad():
            tokens = tuple(ids.to(world.device) for ids in family.tokenize(models, ["a photo of srx dog", "a photo"]))
            captions = family.encode_tokens(models.text_encoders, tokens)
            pixels = torch.zeros(1, 3, config.data.resolution, config.data.resolution, device=world.device)
            moments = family.codec.encode(models.vae, pixels)
        return Base(models, captions, tuple(moments.shape[1:]), world)
    name, shape = published(FAMILIES[config.model.family])
    unet = shape.blank(world.device, DTYPES[config.train.precision])
    fuse(unet, config.engine, torch.device(world.device).type)
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.18215, shift_factor=None))
    beta_S = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = discrete_schedule((1 - beta_S).cumprod(0), "epsilon").to(torch.device(world.device))
    states = torch.randn(2, shape.tokens, shape.width, generator=draw).to(world.device)
    pooled = shape.pooled and torch.randn(2, shape.pooled, generator=draw).to(world.device)
    models = Models(unet, {}, {}, vae, None, schedule, f"random weights, {name}", {"weights": "random"})
    return Base(models, Conditioning(states, pooled), (2 * shape.channels, side, side), world)


def published(family: Family) -> tuple[str, Architecture]:
    """The name and shape of a family's published model; ConfigError where it alone is not enough to train."""
    if family.guide is not None or not family.shapes:
        raise ConfigError(f"model.family: {family.name} is not timed with random weights; give a base in model.path")
    return next(iter(family.shapes.items()))


@contextmanager
def packed(base: Base, config: RunConfig, size: int) -> Iterator[Rig]:
    """A pack of random samples whose rows never end, warm. Afterwards the base is as it was."""
    denoiser = base.models.denoiser
    lay_out(denoiser, config.engine)
    try:
        pack = Pack(
            FAMILIES[config.model.family], base.models, config, size, config.lora.rank, config.train.steps,
            base.captions,
        )  # fmt: skip
        for table, own in zip(tensors_of(pack.captions), tensors_of(base.captions)):
            table.copy_(own.repeat(size, *[1] * (own.dim() - 1)))
        engine = pack.engine
        for arena in engine.arenas:
            arena["master"].normal_(std=0.01)
        for row in range(size):
            engine.show(row)
        engine.live_N.fill_(True)
        engine.end_N.fill_(2**62)
        engine.rates_GNS.fill_(config.train.lr)
        rig = Rig(pack, pack.rehearsal(base.shape))
        for _ in range(pack.warm_steps):
            rig.step()
        yield rig
    finally:
        detach(denoiser)
        release(denoiser)


@dataclass
class Rig:
    """A pack with a batch for it."""

    pack: Pack
    batch: Batch

    def step(self) -> None:
        """One training step."""
        self.pack.step(self.batch)


@contextmanager
def alone(base: Base, config: RunConfig) -> Iterator[SimpleNamespace]:
    """`step`, a training step of a subject alone under DeepSpeed, warm."""
    family, plan = FAMILIES[config.model.family], plan_batches(config.train.batch, None, 1)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "zero"})})
    base.models.denoiser.to(memory_format=torch.contiguous_format)  # DeepSpeed sends no others
    groups = make_trainable(family, base.models, config, "rex")
    module = TrainingStep(family, base.models, config, (1, 2), base.captions)
    engine = ZeroEngine(module, groups, config, plan, base.world)
    roles, count = 2 if config.prior.weight > 0 else 1, config.train.batch
    role_B, slot_B = torch.arange(roles).repeat_interleave(count), torch.arange(roles * count)
    sizes = torch.full((len(slot_B), 6), float(config.data.resolution))
    lows = torch.zeros(len(slot_B), 3, *[low_side(config)] * 2) if family.guide else None
    images = torch.randn(len(slot_B), *base.shape)
    batch = Batch(images, 0 * role_B, role_B, slot_B, sizes, low_BCHW=lows).to(base.world.device)

    def step() -> None:
        engine.backward(engine(batch, 0).loss)
        engine.step(1.0)

    try:
        step()
        yield SimpleNamespace(step=step)
    finally:
        engine.close()
        detach(base.models.denoiser)


def contestants(config: RunConfig, plan: Plan, device: str) -> dict[str, tuple[int, Any]]:
    """(subjects, how to set it up) by name; on a GPU packs run both eagerly and captured. Without DeepSpeed there is no
    `solo`, which is its step."""
    modes = ["off", "graph"] if device.startswith("cuda") else ["off"]
    found: dict[str, tuple[int, Any]] = {}
    if find_spec("deepspeed"):
        found["solo"] = 1, lambda base: alone(base, config)
    for mode in modes:
        engine = config.engine.model_copy(update={"kind": "packed", "capture": mode})
        settings = config.model_copy(update={"engine": engine})
        for size in plan.sizes:
            name = f"pack {size}" + (" captured" if mode == "graph" else "")
            found[name] = size, lambda base, size=size, settings=settings: packed(base, settings, size)
    return found


def measure(config: RunConfig, plan: Plan, say: Say = to_nobody) -> dict[str, Any]:
    """Medians of every contestant, their ratios to solo, and what was asked for beside them. say: gets each turn."""
    base = load(config, plan.random_weights)
    device, rows = base.world.device, {}
    config = resolved_precision(config, torch.device(device).type)
    entries = contestants(config, plan, device)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in entries}
    peaks: dict[str, int] = {}
    too_large: list[str] = []
    for turn in range(plan.turns):
        for name, (size, make) in entries.items():
            try:
                peaks[name], (wall_s, cost_s) = take_turn(partial(make, base), plan.steps, device)
            except torch.OutOfMemoryError:
                if name == "solo":
                    raise
                too_large.append(name)
                continue
            seconds[name].append((wall_s / size, cost_s / size))
            say({"name": name, "turn": turn, "wall_s": wall_s / size, "cost_s": cost_s / size, "peak": peaks[name]})
    entries = {name: entry for name, entry in entries.items() if name not in too_large}
    with packed(base, config, 1) as rig:
        flops = count_flops(lambda: rig.pack.advance(rig.batch))
    top = ceiling_flop_per_s(device, config.train.precision)
    for name, (size, _) in entries.items():
        wall_s, cost_s = (statistics.median(values) for values in zip(*seconds[name]))
        rows[name] = {
            "subjects": size,
            "cost_s": cost_s,
            "wall_s": wall_s,
            "peak_bytes": peaks[name],
            "mfu": flops / cost_s / top,
        }
    for row in rows.values():
        row["times_solo"] = rows["solo"]["cost_s"] / row["cost_s"] if "solo" in rows else None
    result = {"about": about(config, plan, base, flops, top), "steps": rows}
    if too_large:
        result["about"]["memory ran out"] = ", ".join(dict.fromkeys(too_large))
    if plan.processes:
        result["processes"] = side_by_side(config, plan)
    if plan.subjects:
        result["line"] = line(config, plan)
    return result


def take_turn(make: Callable[[], AbstractContextManager], steps: int, device: str) -> tuple[int, tuple[float, float]]:
    """(peak bytes of setting a contestant up, wall and cost seconds of its step).

    No name may hold the first while the second is set up, nor the second when this returns: a recorded step keeps its
    memory for as long as it is there, and the next one would seem not to fit.
    """
    with used_bytes(device) as used, make():
        pass
    with make() as warm:
        return used[0], timed(warm.step, steps, device)


def timed(step: Callable[[], None], steps: int, device: str) -> tuple[float, float]:
    """(wall, cost) seconds of a step; the cost is processor time, or wall time on a GPU, which nobody shares."""
    cuda = device.startswith("cuda")
    torch.cuda.synchronize() if cuda else None
    wall, cost = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    torch.cuda.synchronize() if cuda else None
    wall, cost = time.perf_counter() - wall, time.process_time() - cost
    return wall / steps, (wall if cuda else cost) / steps


def ceiling_flop_per_s(device: str, precision: str) -> float:
    """FLOP/s of a large matrix product in the compute precision; the best of a few."""
    side, dtype = (8192 if device != "cpu" else 1024), DTYPES[precision]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * side**3 / min(timed(lambda: torch.mm(a, b), 1, device)[1] for _ in range(5))


def side_by_side(config: RunConfig, plan: Plan) -> dict[str, float]:
    """A subject's step in so many independent processes at once: median processor seconds, and their peak memory."""
    with ProcessPoolExecutor(plan.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_one_process, config, plan) for _ in range(plan.processes)]
        found = [job.result() for job in jobs]
    wall, cost, peak = zip(*found)
    return {
        "processes": plan.processes,
        "cost_s": statistics.median(cost),
        "wall_s": statistics.median(wall),
        "peak_bytes": sum(peak),
    }


def _one_process(config: RunConfig, plan: Plan) -> tuple[float, float, int]:
    torch.set_num_threads(1)
    base = load(config, plan.random_weights)
    config = resolved_precision(config, torch.device(base.world.device).type)
    with alone(base, config) as solo:
        turns = [timed(solo.step, plan.steps, base.world.device) for _ in range(plan.turns)]
    wall, cost = (statistics.median(values) for values in zip(*turns))
    return wall, cost, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def line(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """T(S) = start + class_s * classes + subject_s * S fitted to whole `dbtrain train` runs of 1 and 2 classes.

    Processor seconds of each run's process; residual_s is the largest distance of a run from the line.
    """
    runs = []
    with tempfile.TemporaryDirectory(prefix="dbtrain-bench-") as folder:
        for subjects in plan.subjects:
            for classes in (1, 2):
                if classes <= subjects:
                    runs.append((classes, subjects, whole_run(config, subjects, classes, Path(folder))))
    table = torch.tensor([(1.0, classes, subjects) for classes, subjects, _ in runs], dtype=torch.float64)
    spent = torch.tensor([seconds for *_, seconds in runs], dtype=torch.float64)
    found = torch.linalg.lstsq(table, spent[:, None]).solution[:, 0]
    start_s, class_s, subject_s = found.tolist()
    return {
        "start_s": start_s,
        "class_s": class_s,
        "subject_s": subject_s,
        "residual_s": (table @ found - spent).abs().max().item(),
        "runs": runs,
    }


def whole_run(config: RunConfig, subjects: int, classes: int, folder: Path) -> float:
    """Processor seconds of one `dbtrain train` of so many made-up subjects, with nothing cached from before."""
    from dbtrain.settings.recipes import render
    from dbtrain.subjects.manifest import read_manifest

    photos = [subject.images[0].parent for subject in read_manifest(DEMO)]
    name = f"{subjects}-{classes}"
    rows = [f"s{i},{('dog', 'cat')[i % classes]},{photos[i % len(photos)]}" for i in range(subjects)]
    (folder / f"{name}.csv").write_text("\n".join(["subject,class,images", *rows]) + "\n")
    (folder / "recipe.yaml").write_text(render(config))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [f"{folder}/{name}.csv", "--config", f"{folder}/recipe.yaml", "--out", f"{folder}/{name}"]
    command = [sys.executable, "-m", "dbtrain", "train", *words, "--subjects", "all", "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def about(config: RunConfig, plan: Plan, base: Base, flops: int, top: float) -> dict[str, Any]:
    """What was measured, where, and with what."""
    cuda = base.world.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cores": os.cpu_count(),
        "base": base.models.source,
        "resolution": config.data.resolution,
        "batch": f"{config.train.batch} instance" + (f" + {config.train.batch} prior" if config.prior.weight else ""),
        "rank": config.lora.rank,
        "precision": config.train.precision,
        "flops_a_subject_step": flops,
        "gemm_flop_per_s": top,
        "plan": asdict(replace(plan, sizes=list(plan.sizes), subjects=list(plan.subjects))),
        **origin(),
        "cost": "device seconds" if cuda else "processor seconds",
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    facts = result["about"]
    lines = [
        f"| | {facts['cost']} a subject's step | times solo | wall | MFU | memory of a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["steps"].items():
        cost_ms, wall_ms = 1e3 * row["cost_s"], 1e3 * row["wall_s"]
        times = "" if row["times_solo"] is None else f"{row['times_solo']:.2f}"
        lines.append(
            f"| {name} | {cost_ms:.2f} ms | {times} | {wall_ms:.2f} ms | {row['mfu']:.1%} "
            f"| {row['peak_bytes'] / 2**20:.0f} MiB |"
        )
    if found := result.get("processes"):
        lines.append(
            f"| {found['processes']} processes | {1e3 * found['cost_s']:.2f} ms | "
            f"{result['steps']['solo']['cost_s'] / found['cost_s']:.2f} | {1e3 * found['wall_s']:.2f} ms | | "
            f"{found['peak_bytes'] / 2**20:.0f} MiB in all |"
        )
    if found := result.get("line"):
        formula = f"T(S) = {found['start_s']:.1f} + {found['class_s']:.1f} classes + {found['subject_s']:.2f} S seconds"
        lines += ["", f"{formula}; largest residual {found['residual_s']:.1f} s over {len(found['runs'])} runs"]
    return "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in facts.items())])


def write(path: Path, result: dict[str, Any]) -> None:
    """PATH.json and PATH.md."""
    write_file(path.with_suffix(".json"), json.dumps(result, indent=1).encode())
    write_file(path.with_suffix(".md"), f"# Packs beside solo training\n\n{table(result)}\n".encode())
