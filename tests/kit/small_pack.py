"""A pack in small: a denoiser of six adaptable layers, subjects that differ in everything, and each of them alone."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dbtrain.engines.engine import lr_scale
from dbtrain.models.family import Models
from dbtrain.objective.noise import discrete_schedule
from dbtrain.packing.pack import Pack, Start
from dbtrain.randomness import stream_key
from dbtrain.results.checkpoint import Checkpoint
from dbtrain.settings.config import LoraConfig, PriorConfig, RunConfig, TrainConfig
from dbtrain.training.step import TrainingStep
from dbtrain.training.trainables import fresh_adapter, make_trainable
from dbtrain.values import Batch, Conditioning, Role
from tests.kit.fake_family import fake_family

BATCH, TARGETS = 2, ("conv", "to_q", "to_k", "to_v", "to_out", "ff")
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


class Denoiser(nn.Module):
    """A 1x1 convolution, cross-attention to the caption (math, which vmap can batch) and a feed-forward layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(4, 8, 1), nn.LayerNorm(8)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(8, 8),
            nn.Linear(5, 8),
            nn.Linear(5, 8),
            nn.Linear(8, 8),
        )
        self.ff, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x_t, time_B, states_BTD):
        told = torch.sin(time_B.to(x_t.dtype) / 100)[:, None, None]
        h = self.norm(self.conv(x_t).flatten(2).mT + told)
        score = self.to_q(h) @ self.to_k(states_BTD).mT / 8**0.5
        h = h + self.to_out(score.softmax(-1) @ self.to_v(states_BTD))
        return self.head(h + F.gelu(self.ff(h))).mT.reshape(x_t.shape)


class Vae:
    """Only what `sample_latents` reads."""

    class config:
        scaling_factor = 0.5
        shift_factor = None


FAMILY = fake_family(
    encode_tokens=lambda *_: None, denoise=lambda net, x_t, time_B, told, _: net(x_t, time_B, told.states_BTD)
)


@dataclass(frozen=True)
class Case:
    """A subject and what is its own."""

    name: str
    seed: int = 0
    lr: float = 1e-2
    steps: int = 8
    rank: int = 2
    prior: float = 0.5
    clip: float | None = 0.05
    schedule: str = "cosine"
    warmup: int = 0
    up_ratio: float = 1.0

    @property
    def config(self) -> RunConfig:
        train = TrainConfig(
            batch=BATCH, lr=self.lr, steps=self.steps, clip_norm=self.clip, weight_decay=0.02, ema=0.8,
            schedule=self.schedule, warmup_steps=self.warmup,
        )  # fmt: skip
        lora = LoraConfig(rank=self.rank, alpha=1.5 * self.rank, targets=TARGETS, up_ratio=self.up_ratio)
        return RunConfig(seed=self.seed, train=train, lora=lora, prior=PriorConfig(weight=self.prior))


@dataclass
class FixedBank:
    """A subject's samples, the same at every step, so that only the named randomness differs."""

    case: Case
    dtype: torch.dtype
    items: dict = field(default_factory=dict)

    def draw(self, step, slots) -> Batch:
        seed = torch.Generator().manual_seed(sum(map(ord, self.case.name)))
        moments = torch.randn(2 * BATCH, 8, 4, 4, dtype=torch.float64, generator=seed).to(self.dtype)
        role = torch.tensor([Role.INSTANCE] * BATCH + [Role.PRIOR] * BATCH)
        return Batch(moments, role.clone(), role, torch.arange(2 * BATCH), torch.zeros(2 * BATCH, 6))


def captions(case: Case, dtype: torch.dtype) -> Conditioning:
    seed = torch.Generator().manual_seed(1 + sum(map(ord, case.name)))
    return Conditioning(torch.randn(2, 3, 5, dtype=torch.float64, generator=seed).to(dtype))


def models_of(dtype: torch.dtype, device: str = "cpu") -> Models:
    # v-prediction: its target takes the latents' dtype, so that float64 goes all the way through.
    schedule = discrete_schedule(ALPHA_BAR, "v_prediction").to(torch.device(device))
    return Models(Denoiser().to(device, dtype), {}, {}, Vae, None, schedule, "fake")


@contextmanager
def adapters_of(dtype: torch.dtype):
    """New adapters are made in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_pack(
    dtype, size: int, rank: int, steps: int, config: RunConfig | None = None, device: str = "cpu", masked: bool = False,
    up_ratio: float = 1.0,
) -> Pack:  # fmt: skip
    models, example = models_of(dtype, device), captions(Case("any"), dtype).to(device)
    with adapters_of(dtype):
        config = config or Case("any", up_ratio=up_ratio).config
        return Pack(FAMILY, models, config, size, rank, steps, example, masked=masked)


def start(pack: Pack, case: Case, dtype: torch.dtype, found: Checkpoint | None = None) -> Start:
    fresh = {"master": fresh_adapter(FAMILY, pack.models, case.config, case.name)}
    return Start(case.name, case.config, captions(case, dtype), found or Checkpoint(0, "", fresh))


def train_pack(cases, dtype=torch.float64, size=None, rank=None, poison=None, device="cpu"):
    """({name: final state}, {name: norms of its steps}, pack) of cases that take rows as rows come free, in order.

    poison: (name, step) at which the subject's moments turn NaN.
    """
    size = size or len(cases)
    rank, steps = rank or max(case.rank for case in cases), max(case.steps for case in cases)
    pack = make_pack(dtype, size, rank, steps, device=device, up_ratio=cases[0].up_ratio)
    waiting, seats, states, norms = list(cases), {}, {}, {case.name: [] for case in cases}
    update = pack.engine.update

    def noted(sound_N):
        norm_N = update(sound_N)
        for row, (case, _) in seats.items():
            norms[case.name].append(norm_N[row].item())
        return norm_N

    pack.engine.update = noted
    while waiting or seats:
        for row in range(size):
            if row not in seats and waiting:
                case = waiting.pop(0)
                pack.seat(row, start(pack, case, dtype))
                seats[row] = [case, 0]
        batch = pack.batch([(row, FixedBank(case, dtype), step) for row, (case, step) in seats.items()])
        for row, (case, step) in seats.items():
            if poison == (case.name, step):
                batch.images_BCHW[row * 2 * BATCH] = torch.nan
        pack.advance(batch)
        seen = pack.observe()
        for row, seat in list(seats.items()):
            seat[1] += 1
            if not seen[row].live:
                states[seat[0].name] = pack.engine.state(row)
                pack.engine.release(row)
                del seats[row]
    return states, norms, pack


def train_alone(case: Case, dtype=torch.float64, steps: int | None = None):
    """The subject's final state by TrainingStep for one, torch's AdamW and clip_grad_norm_, and nothing of a pack."""
    config, models = case.config, copy.copy(models_of(dtype))
    with adapters_of(dtype):
        groups = make_trainable(FAMILY, models, config, case.name)
    params = {name: param for group in groups for name, param in group.params.items()}
    halves = [[param for name, param in params.items() if name.endswith(kind)] for kind in ("down_NRD", "up_NDR")]
    adamw = torch.optim.AdamW([{"params": half} for half in halves], lr=case.lr, weight_decay=0.02)
    step_of = TrainingStep(FAMILY, models, config, stream_key(config.seed, case.name), captions(case, dtype))
    ema = {name: param.detach().clone() for name, param in params.items()}
    for step in range(case.steps if steps is None else steps):
        for half, ratio in zip(adamw.param_groups, (1, case.up_ratio)):
            half["lr"] = ratio * case.lr * lr_scale(step, config.train, case.steps)
        step_of(FixedBank(case, dtype).draw(step, range(BATCH)), step).loss.backward()
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), case.clip)
        adamw.step()
        adamw.zero_grad()
        for name, param in params.items():
            ema[name].lerp_(param.detach(), 0.2)
    return {
        "master": {name: param.detach() for name, param in params.items()},
        **{
            kind: {name: adamw.state[param][kind] for name, param in params.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        },
        "ema": ema,
    }


def distance(ours, theirs) -> float:
    """Largest relative difference of any kind of state, each as one vector."""

    def flat(group):
        return torch.cat([group[name].flatten().double() for name in sorted(group)])

    return max(((flat(ours[k]) - flat(theirs[k])).norm() / flat(theirs[k]).norm()).item() for k in theirs)


def equal(ours, theirs) -> bool:
    return all(torch.equal(ours[kind][name], theirs[kind][name]) for kind in theirs for name in theirs[kind])
