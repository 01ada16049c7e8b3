"""The training loop of the recipe's stages: wall-clock schedule, EMA, resumable checkpoints, a jsonl log.

The schedule is a function of time spent over time granted, so a stage always ends fully decayed; granting more
minutes to a finished stage continues it from its checkpoint.
"""

import json
import math
import os
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    """bf16 autocast on accelerators; fp32 on CPUs, where these narrow layers are faster in it (measured 1.6-2x)."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=device().type != "cpu")


def crew_size() -> int:
    """The number of processes that share a stage's batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def crew_rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(tensors: list) -> None:
    """Sum each tensor over the crew, in place, in one message."""
    if crew_size() == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    torch._foreach_copy_(
        tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
    )


def _enlist(rank: int, size: int, stage, work: Path, arguments: tuple) -> None:
    """One crew member: a single thread, joined by a file in `work`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/crew-{os.getppid()}", rank=rank, world_size=size)
    stage(work, *arguments)
    dist.destroy_process_group()


def with_crew(stage, work: Path, *arguments, size: int = 2) -> None:
    """Run `stage(work, *arguments)` in `size` single-threaded processes, or once on an accelerator.

    One process a core outruns one process of two threads (72 and 60 VAE pictures/s), and a busy neighbour
    slows it in proportion instead of tenfold.
    """
    if size == 1 or device().type != "cpu":
        stage(work, *arguments)
    else:
        torch.multiprocessing.spawn(_enlist, (size, stage, work.resolve(), arguments), nprocs=size)


def orthogonalize(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of `update` (rows x columns), by quintic Newton-Schulz (Muon, Jordan 2024)."""
    matrix = update.float() if update.device.type == "cpu" else update.bfloat16()
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return (matrix if wide else matrix.T).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with AdamW's update size (arXiv 2502.16982: 0.2 sqrt(max side)) for matrices and convolutions."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _updates(self, group: dict) -> list:
        """The orthogonal update of each parameter; a crew shares the work and adds up."""
        updates = []
        for index, param in enumerate(group["params"]):
            velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
            velocity.lerp_(param.grad, 1 - group["momentum"])
            update = torch.zeros_like(param)
            if index % crew_size() == crew_rank():
                matrix = param.grad.lerp(velocity, group["momentum"]).reshape(len(param), -1)
                update.copy_(orthogonalize(matrix).mul_(0.2 * math.sqrt(max(matrix.shape))).reshape(param.shape))
            updates.append(update)
        total(updates)
        return updates

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients; nothing is returned."""
        for group in self.param_groups:
            updates = self._updates(group)
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(group["params"], updates, alpha=-group["lr"])


def _is_matrix(name: str, param: torch.Tensor) -> bool:
    """Whether Muon drives this parameter: hidden matrices and convolutions, no embeddings."""
    return (
        param.ndim >= 2 and "embedding" not in name and "embeddings" not in name and min(param.flatten(1).shape) >= 16
    )


def optimizers(model: torch.nn.Module, lr: float, muon: bool) -> list:
    """AdamW over everything, or Muon over the matrices and AdamW over the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if muon and _is_matrix(n, p)]
    rest = [p for n, p in named if not (muon and _is_matrix(n, p))]
    found = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)]
    return found + ([Muon(matrices, lr=lr)] if matrices else [])


def pace(spent_share: float, step: int, warmup_steps: int) -> float:
    """The learning-rate factor: linear warmup, then cosine to zero at the end of the granted time."""
    return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, spent_share)))


def stream_of(purpose: int, step: int) -> np.random.Generator:
    """The random stream of one purpose and step, different for each crew member."""
    return np.random.default_rng((purpose, step, crew_rank()))


class Log:
    """A jsonl file of one record per line, stamped with the stage's name."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def write(self, **record) -> None:
        """Append one record and echo it."""
        line = json.dumps(
            {"stage": self.stage, **{k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}}
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def weights(work: Path, *stages: str) -> dict | None:
    """The averaged weights of the first of the stages that has some: its checkpoint's, else the ones it starts from."""
    for path in (work / f"{stage}{end}.pt" for stage in stages for end in ("", "-start")):
        if path.exists():
            saved = torch.load(path, map_location=device(), weights_only=True)
            return saved.get("average", saved)
    return None


class Trainer:
    """One stage's training: `run(loss_of_step)` until the granted minutes are spent, from the last checkpoint on.

    Without a checkpoint it starts from `work`/`stage`-start.pt, where there is one (stage `restore` writes them).
    """

    def __init__(
        self,
        stage: str,
        model: torch.nn.Module,
        work: Path,
        minutes: float,
        lr: float,
        muon: bool = False,
        ema: float = 0.999,
        warmup_steps: int = 100,
        clip: float = 1.0,
    ):
        self.stage, self.model, self.minutes, self.lr = stage, model, minutes, lr
        self.decay, self.warmup_steps, self.clip = ema, warmup_steps, clip
        self.path, self.log = work / f"{stage}.pt", Log(work / "log.jsonl", stage)
        start = None if self.path.exists() else weights(work, stage)
        if start is not None:
            model.load_state_dict(start)
        self.average = deepcopy(model).eval().requires_grad_(False)
        self.optimizers = optimizers(model, lr, muon)
        self.step, self.spent_s = 0, 0.0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        saved = torch.load(self.path, map_location=device(), weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.spent_s = saved["step"], saved["spent_s"]

    def save(self) -> None:
        """Write the checkpoint (model, average, optimizers, step, seconds spent) by atomic rename."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "step": self.step,
            "spent_s": self.spent_s,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.path)

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        averages = list(self.average.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in self.model.parameters()], 1 - decay)

    def _update(self, loss: torch.Tensor) -> None:
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        total(grads)
        torch._foreach_div_(grads, crew_size())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        rate = self.lr * pace(self.spent_s / (60 * self.minutes), self.step, self.warmup_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._follow()

    def _agree(self, spent_s: float) -> float:
        """The first member's clock, so that the crew stops together."""
        clock = torch.tensor([spent_s if crew_rank() == 0 else 0.0], dtype=torch.float64)
        total([clock])
        return float(clock)

    def run(self, loss_of_step, every: int = 200, save_s: float = 60.0, watch=None):
        """The EMA model after training on `loss_of_step(step) -> (loss, {name: tensor})`, from the last checkpoint on.

        watch: `watch(average, step) -> {name: float}`, called at each log line, every `every` steps.
        """
        last, kept, count = time.monotonic(), time.monotonic(), 0
        sums: dict[str, float] = {}
        while self.spent_s < 60 * self.minutes:
            loss, parts = loss_of_step(self.step)
            self._update(loss)
            self.step, count = self.step + 1, count + 1
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            now = time.monotonic()
            self.spent_s, last = self._agree(self.spent_s + now - last), now
            if crew_rank() > 0:
                continue
            if self.step % every == 0:
                seen = watch(self.average, self.step) if watch else {}
                self.log.write(step=self.step, spent_s=self.spent_s, **{k: v / count for k, v in sums.items()}, **seen)
                sums, count = {}, 0
            if now - kept > save_s:
                self.save()
                kept = time.monotonic()
        if crew_rank() == 0:
            self.save()
            self.log.write(step=self.step, spent_s=self.spent_s, finished=True)
        return self.average
