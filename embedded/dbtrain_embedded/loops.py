"""The training loop of the recipe's stages: schedule by wall-clock time, EMA, checkpoints to resume from, a jsonl log.

The learning rate depends on the share of the minutes that is spent, so it is zero at the end on any machine. A finished
stage that is given more minutes continues from its checkpoint.
"""

import json
import math
import os
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

WARMUP_STEPS = 100
GRADIENT_NORM = 1.0
"""Gradients of a larger norm are scaled down to it."""


def device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def autocast():
    """A context: bf16 autocast on an accelerator, and on a CPU that multiplies in bf16; fp32 on other CPUs.

    On a CPU that multiplies in bf16 the UNet trains 1.7 times as fast so. PyTorch's attention for CPUs does not: its
    backward pass takes eight times as long in bf16 as in fp32. So attention on CPUs is computed by matrix products.
    """
    on_cpu = device().type == "cpu"
    with (
        torch.autocast(device().type, dtype=torch.bfloat16, enabled=not on_cpu or _multiplies_bf16()),
        sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext(),
    ):
        yield


def _multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def crew_size() -> int:
    """The number of processes that share a stage's batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def crew_rank() -> int:
    """The rank of this process in the crew, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_crew(tensors: list) -> None:
    """Sum each tensor over the crew, in place; one message carries them all."""
    if crew_size() == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    torch._foreach_copy_(
        tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
    )


def _enlist(rank: int, size: int, stage, work: Path, arguments: tuple) -> None:
    """Run `stage(work, *arguments)` as member `rank` of a crew, in one thread; members find each other by a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/crew-{os.getppid()}", rank=rank, world_size=size)
    stage(work, *arguments)
    dist.destroy_process_group()


def with_crew(stage, work: Path, *arguments, size: int = 2) -> None:
    """Run `stage(work, *arguments)` in `size` processes of one thread each, or in this process on an accelerator.

    One process a core is faster than one process of two threads: 72 and 60 VAE pictures/s. On a core that is also used
    by another program, threads wait for each other and are ten times slower; processes only lose that core's share.
    """
    if size == 1 or device().type != "cpu":
        stage(work, *arguments)
    else:
        torch.multiprocessing.spawn(_enlist, (size, stage, work.resolve(), arguments), nprocs=size)


def orthogonalize(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly the closest semi-orthogonal matrix to `update` (rows x columns), by Newton-Schulz (Muon, Jordan 2024)."""
    # X <- aX + b(XX^T)X + c(XX^T)^2 X changes only the singular values: s <- as + bs^3 + cs^5. Jordan's coefficients
    # bring every s in (0, 1] into about [0.7, 1.2] within five steps. The norm bounds the largest s by 1 first.
    # All steps together are one matrix Q times X, and Q needs only XX^T, the smaller square: X_k = Q X, with
    # X_k X_k^T = Q (XX^T) Q^T. A step then costs the same for any length of the rows.
    # It needs fp32: the roundings of bf16 in XX^T bring singular values of updates of low rank to 4.
    matrix = update.float()
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    matrix = matrix / (matrix.norm() + 1e-7)
    first, whole = matrix @ matrix.T, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        gram = whole @ first @ whole.T
        whole = 3.4445 * whole + (-4.7750 * gram + 2.0315 * gram @ gram) @ whole
    matrix = whole @ matrix
    return (matrix if wide else matrix.T).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions, scaled by 0.2 sqrt(longer side) to AdamW's update size (arXiv 2502.16982)."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _updates(self, group: dict) -> list:
        """The orthogonal update of each parameter; each crew member computes some and the sum hands all to all."""
        updates = []
        for index, param in enumerate(group["params"]):
            velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
            velocity.lerp_(param.grad, 1 - group["momentum"])
            update = torch.zeros_like(param)
            if index % crew_size() == crew_rank():
                matrix = param.grad.lerp(velocity, group["momentum"]).reshape(len(param), -1)
                update.copy_(orthogonalize(matrix).mul_(0.2 * math.sqrt(max(matrix.shape))).reshape(param.shape))
            updates.append(update)
        sum_over_crew(updates)
        return updates

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters from their gradients."""
        for group in self.param_groups:
            updates = self._updates(group)
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(group["params"], updates, alpha=-group["lr"])


def _is_matrix(name: str, param: torch.Tensor) -> bool:
    """Whether Muon updates this parameter: yes for hidden matrices and convolutions, no for embeddings."""
    return (
        param.ndim >= 2 and "embedding" not in name and "embeddings" not in name and min(param.flatten(1).shape) >= 16
    )


def optimizers(model: torch.nn.Module, lr: float, muon: bool) -> list:
    """AdamW for all trainable parameters, or, with `muon`, Muon for the matrices and AdamW for the others."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    matrices = [param for name, param in named if muon and _is_matrix(name, param)]
    others = [param for name, param in named if not (muon and _is_matrix(name, param))]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    return [adamw, Muon(matrices, lr=lr)] if matrices else [adamw]


def pace(spent_share: float, step: int, warmup_steps: int = WARMUP_STEPS) -> float:
    """The factor of the learning rate: a linear warmup in steps times a cosine in the spent share of the minutes."""
    return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, spent_share)))


def stream_of(purpose: int, step: int) -> np.random.Generator:
    """The random generator of one purpose and step; each crew member has its own."""
    return np.random.default_rng((purpose, step, crew_rank()))


class Log:
    """A jsonl file; each line is one record and names the stage."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def write(self, **record) -> None:
        """Append one record and print it."""
        line = json.dumps(
            {"stage": self.stage, **{k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}}
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def weights(work: Path, *stages: str) -> dict | None:
    """The averaged weights of the first of the stages that has some; None where no stage has.

    A stage's weights are those of its checkpoint, else those of its starting point `work`/<stage>-start.pt.
    """
    for path in (work / f"{stage}{end}.pt" for stage in stages for end in ("", "-start")):
        if path.exists():
            saved = torch.load(path, map_location=device(), weights_only=True)
            return saved.get("average", saved)
    return None


class Trainer:
    """The training of one stage, resumed from its checkpoint `work`/`stage`.pt where there is one.

    Without a checkpoint the model starts from `work`/`stage`-start.pt, which stage `restore` writes, or as it is.
    minutes: wall-clock time in all, time before the checkpoint included. lr: the highest learning rate.
    ema: decay of the averaged weights.
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
    ):
        self.model, self.minutes, self.lr, self.decay = model, minutes, lr, ema
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
        """Write the checkpoint (model, average, optimizers, step, seconds spent), whole or not at all."""
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
    def _update_average(self) -> None:
        # A short memory at first, so that the average soon forgets the untrained weights.
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        averages = list(self.average.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in self.model.parameters()], 1 - decay)

    def _update(self, loss: torch.Tensor) -> None:
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        sum_over_crew(grads)
        torch._foreach_div_(grads, crew_size())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        rate = self.lr * pace(self.spent_s / (60 * self.minutes), self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._update_average()

    def _agreed_time(self, spent_s: float) -> float:
        """The `spent_s` of the crew's first member, so that all members stop at the same step."""
        clock = torch.tensor([spent_s if crew_rank() == 0 else 0.0], dtype=torch.float64)
        sum_over_crew([clock])
        return float(clock)

    def run(self, loss_of_step, every: int = 200, save_s: float = 60.0, watch=None) -> None:
        """Train on `loss_of_step(step) -> (loss, {name: tensor})` until the minutes are spent; then save.

        every: steps between log lines. save_s: seconds between checkpoints.
        watch: `watch(average, step) -> {name: float}` measures the averaged model for each log line; None: nothing.
        """
        last, saved, count = time.monotonic(), time.monotonic(), 0
        sums: dict[str, float] = {}
        while self.spent_s < 60 * self.minutes:
            loss, parts = loss_of_step(self.step)
            self._update(loss)
            self.step, count = self.step + 1, count + 1
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            now = time.monotonic()
            self.spent_s, last = self._agreed_time(self.spent_s + now - last), now
            if crew_rank() > 0:
                continue
            if self.step % every == 0:
                measured = watch(self.average, self.step) if watch else {}
                means = {name: value / count for name, value in sums.items()}
                self.log.write(step=self.step, spent_s=self.spent_s, **means, **measured)
                sums, count = {}, 0
            if now - saved > save_s:
                self.save()
                saved = time.monotonic()
        if crew_rank() == 0:
            self.save()
            self.log.write(step=self.step, spent_s=self.spent_s, finished=True)
