"""A pack: N subjects' adapters on one base, and one training step of them all.

`advance` can be captured: all that a step reads is on the device, a new subject changes it in place, and no step waits
for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dbtrain.data.index import Index
from dbtrain.engines.capture import choose_capture, make_runner, steps_to_warm
from dbtrain.engines.engine import lr_scale
from dbtrain.engines.loss_scale import DTYPES
from dbtrain.engines.packed import PackedEngine, RowSettings
from dbtrain.models.adapters import layers
from dbtrain.models.family import Family, Models, Tokens, low_side
from dbtrain.models.fused_projections import FusedProjections, fuses, groups_of, side_by_side
from dbtrain.randomness import stream_key
from dbtrain.results.checkpoint import Checkpoint
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.training.bank import Bank, captions_of, join_batches
from dbtrain.training.held_out import FIXED, fixed_samples, turns
from dbtrain.training.session import Base
from dbtrain.training.step import TrainingStep
from dbtrain.training.trainables import lora_alpha, make_stack, peak_rates, trained_components
from dbtrain.values import Batch, Conditioning

CAPTIONS = 2
"""Distinct captions of a subject whose photos share one: theirs and its class's. Others ask for more room."""
WINDOW = 50
"""Steps over which the error that `train.stop_loss` looks at is averaged."""
MEASURED = ("loss", "loss_instance", "loss_prior", "grad_norm", "lr")


@dataclass(frozen=True)
class Start:
    """What a subject trains from. captions: those of its bank, encoded, or as tokens."""

    subject: str
    config: RunConfig
    captions: Conditioning | Tokens
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Observed:
    """The state of a row. values: means of the measured values since `forget`. step: updates made. live: whether it
    still trains. failed: whether it met a number that is not finite. average: what `train.stop_loss` is compared with.
    """

    values: dict[str, float]
    step: int
    live: bool
    failed: bool
    average: float


class Pack:
    """N rows for subjects. Ranks may differ up to `rank`, step counts up to `steps`, distinct captions up to `room`.
    example: captions of any subject, used for shapes only.

    masked: whether any subject of the run has masks. Then every batch has factors, since a recorded step cannot change
    what it reads; those of subjects without masks are 1, which changes no bit.
    """

    def __init__(
        self,
        family: Family,
        models: Models,
        config: RunConfig,
        size: int,
        rank: int,
        steps: int,
        example: Conditioning | Tokens,
        room: int = CAPTIONS,
        masked: bool = False,
    ):
        self.family, self.models, self.config, self.size, self.masked = family, models, config, size, masked
        self.room = room
        self.roles = 2 if config.prior.weight > 0 else 1
        stack = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": rank})})
        groups = make_stack(family, models, stack, size)
        device = next(iter(groups[0].params.values())).device
        self.device = str(device)
        choice, together = choose_capture(config.engine, device.type), []
        if fuses(config.engine, device.type):
            by_block = config.train.gradient_checkpointing or choice.mode.startswith("compile")
            components = trained_components(family, models, config).values()
            together = [one for module in components for one in groups_of(module, all_captions=not by_block)]
            groups = [replace(group, params=side_by_side(group.params, together)) for group in groups]
        self.engine = PackedEngine(groups, config.train, steps, DTYPES[config.train.precision])
        self.key_N2 = torch.zeros(size, 2, dtype=torch.long, device=device)
        self.prior_N = torch.zeros(size, device=device)
        self.captions = _blank(example, size * self.room)
        self.module = TrainingStep(family, models, config, self.key_N2, self.captions, self.prior_N)
        casts = config.train.precision != "fp32" and self.module.half is None
        self.fused = [] if casts else [FusedProjections(layers) for layers in together]
        self.module.scale_N = None if self.engine.scales is None else self.engine.scales.scale_N
        self.subject_B = torch.arange(size, device=device).repeat_interleave(self.roles * config.train.batch)
        self.sums_NV = torch.zeros(size, len(MEASURED) + 1, dtype=torch.float64, device=device)
        self.average_N = torch.zeros(size, dtype=torch.float64, device=device)
        self.parts: list[Batch | None] = [None] * size
        self.drawn: dict[int, tuple[Bank, int, Batch]] = {}
        self.runner = make_runner(choice, models.denoiser, family.regions)

    @torch.no_grad()
    def seat(self, row: int, start: Start) -> None:
        """Let a subject train in a row."""
        config = start.config
        rates = [
            [
                rate * lr_scale(step, config.train, config.train.steps)
                for step in range(config.train.steps)
            ]
            for component in trained_components(self.family, self.models, config)
            for rate in peak_rates(self.family, config, component)
        ]
        settings = RowSettings(rates, config.train.clip_norm, config.train.weight_decay)
        self.engine.load(row, start.checkpoint.state, start.checkpoint.step, settings)
        for module in trained_components(self.family, self.models, config).values():
            for _, layer in layers(module):
                layer.scale_N[row] = lora_alpha(config) / config.lora.rank
        self.key_N2[row] = torch.tensor(stream_key(config.seed, start.subject))
        self.prior_N[row] = config.prior.weight
        assert len(tensors_of(start.captions)[0]) <= self.room, "its captions would run into the next row's"
        for table, own in zip(tensors_of(self.captions), tensors_of(start.captions), strict=True):
            table[row * self.room : row * self.room + len(own)] = own
        self.sums_NV[row], self.average_N[row] = 0, start.checkpoint.average

    def rehearsal(self, shape: Sequence[int]) -> Batch:
        """Random samples for every row; shape: of a sample's moments, or of its pixels where they are encoded anew."""
        count, side = self.config.train.batch, float(self.config.data.resolution)
        role_B = torch.arange(self.roles).repeat_interleave(count).repeat(self.size)
        slot_B = torch.arange(self.roles * count).repeat(self.size)
        images, sizes = torch.randn(len(slot_B), *shape), torch.full((len(slot_B), 6), side)
        masks = self._no_mask(images) if self.masked else None
        lows = torch.zeros(len(slot_B), 3, *[low_side(self.config)] * 2) if self.family.guide else None
        batch = Batch(images, self.room * self.subject_B.cpu(), role_B, slot_B, sizes, self.subject_B, masks, lows)
        return batch.to(self.device)

    def batch(self, banks: Sequence[tuple[int, Bank, int]]) -> Batch:
        """The samples of (row, bank, step) for each subject that trains; a row without a subject gets its last samples
        again."""
        for row, bank, step in banks:
            drawn = self.drawn.pop(row, None)
            is_next = drawn is not None and drawn[0] is bank and drawn[1] == step
            self.parts[row] = drawn[2] if drawn is not None and is_next else self._draw(bank, step)
        return self._joined(self.parts)

    def _joined(self, parts: Sequence[Batch | None]) -> Batch:
        """As many samples of each row as a step takes, or fewer; a row without any gets those of another."""
        known = [part for part in parts if part is not None]
        joined = join_batches([part or known[0] for part in parts])
        if self.masked and joined.mask_B1HW is None:
            joined = replace(joined, mask_B1HW=self._no_mask(joined.images_BCHW))
        joined = joined.sent(self.device)
        subject_B = self.subject_B.view(self.size, -1)[:, : len(joined.slot_B) // self.size].reshape(-1)
        return replace(joined, caption_B=joined.caption_B + self.room * subject_B, subject_B=subject_B)

    def draw_ahead(self, banks: Iterable[tuple[int, Bank, int]]) -> None:
        """Draw what the next `batch` will ask for, while the device is busy with the last one."""
        self.drawn = {row: (bank, step, self._draw(bank, step)) for row, bank, step in banks}

    def _draw(self, bank: Bank, step: int) -> Batch:
        return bank.draw(step, range(self.config.train.batch))

    def _no_mask(self, images_BCHW: Tensor) -> Tensor:
        """Factors of 1 for these samples, moments or pixels."""
        codec = self.family.codec
        cell = 1 if codec.is_encoded(images_BCHW) else codec.cell
        return torch.ones(len(images_BCHW), 1, *(side // cell for side in images_BCHW.shape[2:]))

    @property
    def warm_steps(self) -> int:
        """Steps to make before a step can be timed: those that compile or record, and choose kernels."""
        return steps_to_warm(self.runner.choice.mode)

    def step(self, batch: Batch) -> None:
        """`advance`, run as `engine.capture` says."""
        self.runner(self.advance, batch)

    def advance(self, batch: Batch) -> None:
        """One optimizer step of every live row."""
        engine = self.engine
        for projections in self.fused:
            projections.forget()
        loss = self.module(batch, engine.step_N)
        loss.loss.backward()
        with torch.no_grad():
            error_NR = loss.per_sample_B.detach().double().view(self.size, self.roles, -1).mean(2)
            loss_N = (loss.per_sample_B * loss.weight_B).detach().double().view(self.size, -1).sum(1)
            rate_N, live_N = engine.rates_GN[0], engine.live_N.clone()
            norm_N = engine.update(torch.isfinite(loss_N))
            moved_N = live_N & ~engine.failed_N
            prior_N = error_NR[:, 1] if self.roles > 1 else torch.zeros_like(loss_N)
            values = (loss_N, error_NR[:, 0], prior_N, norm_N.double(), rate_N, torch.ones_like(loss_N))
            self.sums_NV += torch.where(moved_N[:, None], torch.stack(values, 1), 0.0)
            self._stop_early(moved_N, error_NR[:, 0])

    def _stop_early(self, moved_N: Tensor, error_N: Tensor) -> None:
        """Keep the average of the photos' error: a mean of the first WINDOW steps, exponential from there."""
        step_N = self.engine.step_N
        average_N = self.average_N + (error_N - self.average_N) / step_N.clamp(1, WINDOW)
        self.average_N.copy_(torch.where(moved_N, average_N, self.average_N))
        if self.config.train.stop_loss is not None:
            self.engine.live_N &= ~(moved_N & (step_N >= WINDOW) & (self.average_N < self.config.train.stop_loss))

    @torch.no_grad()
    def fixed_losses(self, banks: Mapping[int, Bank]) -> list[float]:
        """The error of each row's watched photos at fixed noise. All rows are run, as a step does, so that none depends
        on which others are watched."""
        samples = self.config.train.stop.samples
        error_N, step_N = torch.zeros_like(self.average_N), torch.full_like(self.engine.step_N, FIXED)
        for slots in turns(samples, self.roles * self.config.train.batch):
            parts = {row: fixed_samples(bank, slots) for row, bank in banks.items()}
            for projections in self.fused:
                projections.forget()
            loss = self.module(self._joined([parts.get(row) for row in range(self.size)]), step_N)
            error_N += loss.per_sample_B.double().view(self.size, -1).sum(1)
        return (error_N / samples).tolist()

    def observe(self) -> list[Observed]:
        """The state of every row. Only this method waits for the device."""
        engine = self.engine
        flags = (engine.step_N, engine.live_N, engine.failed_N, self.average_N)
        table = torch.cat([self.sums_NV, torch.stack([flag.double() for flag in flags], 1)], 1).tolist()
        return [_observed(row) for row in table]

    @torch.no_grad()
    def forget(self, rows: Sequence[int]) -> None:
        """Start new means of the measured values of rows."""
        self.sums_NV[list(rows)] = 0


def make_pack(base: Base, configs: Sequence[RunConfig], size: int, room: int = CAPTIONS, masked: bool = False) -> Pack:
    """An empty pack that the subjects with these settings fit in. room: most captions of a subject. masked: see `Pack`.

    Its rank is the largest of all these subjects, so results do not depend on which train together.
    """
    rank, steps = (max(values) for values in zip(*((c.lora.rank, c.train.steps) for c in configs)))
    captions = captions_of(base.family, base.models, base.settings, [""], base.world.device)
    return Pack(base.family, base.models, base.settings, size, rank, steps, captions, room, masked)


def captions_room(index: Index, subjects: Iterable[str], data: DataConfig) -> int:
    """Most distinct captions that a bank of these subjects can have, the class's included."""
    own = (len({entry.caption for entry in index.entries_of(name)}) for name in subjects)
    return max(1, *own, 1) + 1 + (data.caption_dropout > 0)


def _observed(row: list[float]) -> Observed:
    *sums, count = row[: len(MEASURED) + 1]
    step, live, failed, average = row[len(MEASURED) + 1 :]
    means = {name: total / count for name, total in zip(MEASURED, sums)} if count else {}
    return Observed(means, int(step), bool(live), bool(failed), average)


def tensors_of(captions: Conditioning | Tokens) -> list[Tensor]:
    """The tensors of captions, in a fixed order."""
    if isinstance(captions, Conditioning):
        return [value for one in fields(captions) if (value := getattr(captions, one.name)) is not None]
    return list(captions)


def _blank(captions: Conditioning | Tokens, rows: int) -> Conditioning | Tokens:
    """Room for so many captions like these. Masks begin as True: attention over nothing but padding is NaN."""

    def empty(tensor: Tensor) -> Tensor:
        return tensor.new_full((rows, *tensor.shape[1:]), tensor.dtype == torch.bool)

    return captions.map(empty) if isinstance(captions, Conditioning) else tuple(map(empty, captions))
