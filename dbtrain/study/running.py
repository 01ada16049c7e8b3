"""A study's work: every variant trained on every pilot subject, as rows of packs, then scored by the protocol.

Each variant is a run of its own, OUT/variants/NAME, with the files that `dbtrain train` would leave there. So what is
finished is never trained again, and every other verb works on it. Photos, class images, identifiers and the base
model's pictures are shared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from dbtrain.engines.world import start_world
from dbtrain.errors import ConfigError, DataError, DbtrainError
from dbtrain.evaluate import RESULT
from dbtrain.evaluate.judge import Judge, load_judge
from dbtrain.evaluate.protocol import Protocol, about, evaluate_finished, planned
from dbtrain.evaluate.together import draw_together
from dbtrain.models.sampling import sampling_mode
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import IMPORTED, prior_key
from dbtrain.results.checkpoint import checkpoint_folder
from dbtrain.results.record import RECORD, finished_record
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import LOCK, held, write_file
from dbtrain.study.findings import Goal, Row, worse
from dbtrain.study.variants import Design, Group, Variant, own_values, packed, shorter, waves
from dbtrain.subjects.finding import refuse
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.registry import REGISTRY
from dbtrain.train import train_subjects
from dbtrain.training.session import CLASSES, Base, PriorCache, Watch, Work, open_work
from dbtrain.training.stopping import signals_as_before
from dbtrain.values import Subject

OWN_STAGES = ("data", "encode", "build", "train", "stop", "save")
"""Stages of a record that a subject costs by itself. Loading, class images and samples are told apart or left out."""
PRIORS = "prior-seconds.json"
FEWEST = 4
"""Subjects before a variant may be dropped: an interval over fewer is little more than their extremes."""


@dataclass(frozen=True)
class Rows(Work):
    """The work of a group: each subject once for every variant. places: the folder of each row's results."""

    places: Mapping[Subject, Path] = field(default_factory=dict)

    def folder(self, subject: Subject) -> Path:
        """The folder of a row's results."""
        return self.places[subject]


@dataclass
class Study:
    """One study: its design, its pilot subjects, where it works, how it scores, and what is good enough.

    halve: train on a few subjects first, and go on without the variants that are clearly worse; these are then in
    `dropped`, with the reason. fleet: trains a manifest by a recipe into a folder, each variant whole, before all are
    scored here; None trains them here, as rows of common packs. subjects: those of the manifest, once it was read.
    failed: what failed and why, by variant and subject.
    """

    design: Design
    manifest: Path
    out: Path
    protocol: Protocol
    watch: Watch
    goal: Goal = field(default_factory=Goal)
    halve: bool = False
    fleet: Callable[[Path, RunConfig, Path], object] | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    subjects: list[Subject] = field(default_factory=list)

    def run(self) -> list[Row]:
        """What every variant came to on every subject. What failed is in `failed`; the others are not affected.

        Raises DataError for a manifest with findings, and where another study works in the same folder.
        """
        if start_world().size > 1:
            raise ConfigError("study: works in one process; start it without deepspeed or torchrun")
        if self.fleet and self.halve:
            raise ConfigError("--workers, --halve: a fleet trains every variant to its end; give one of them")
        variants = self.design.variants()
        subjects, findings = scan_manifest(self.manifest, variants[0].config.data.shards is None)
        refuse(findings)
        refuse_own_values(subjects, variants)
        self.subjects, self.dropped, self.failed = subjects, {}, {}
        rows: dict[tuple[str, str], Row] = {}
        with signals_as_before(), ExitStack() as fence:
            if not fence.enter_context(held(self.out / LOCK)):
                raise DataError(f"{self.out}: another study is working there; wait for it, or use another --out")
            for variant in variants if self.fleet else ():
                self.train_by_fleet(variant)
            base = None
            for count in rounds(len(subjects)) if self.halve else [len(subjects)]:
                left = [variant for variant in variants if variant.name not in self.dropped]
                for group in self.design.groups(left):
                    base = self.base_for(self.shared_settings(group.config), base)
                    for row in self.train_group(base, group, subjects[:count]):
                        rows[row.variant, row.subject] = row
                if self.halve:
                    self.drop(self.evened(rows, variants), left)
        return self.evened(rows, variants)

    def train_by_fleet(self, variant: Variant) -> None:
        """Train a variant as `dbtrain batch run` does, with the photos' identifiers and class images of the study, so
        that its rows are found finished here. What the fleet could not train is tried here once more."""
        assert self.fleet is not None
        self.fleet(self.manifest, self.shared_settings(packed(variant.config)), self.out / "variants" / variant.name)

    def evened(self, rows: Mapping[tuple[str, str], Row], variants: Sequence[Variant]) -> list[Row]:
        """The rows in the order of variants and subjects, with the costs of each group shared out by steps."""
        found: dict[tuple[str, str], Row] = {}
        for group in self.design.groups(variants):
            names = {variant.name for variant in group.variants}
            found |= {(row.variant, row.subject): row
                      for row in even_costs([row for row in rows.values() if row.variant in names])}  # fmt: skip
        order = [(variant.name, subject.id) for variant in variants for subject in self.subjects]
        return [found[key] for key in order if key in found]

    def train_group(self, base: Base, group: Group, subjects: Sequence[Subject]) -> list[Row]:
        """The rows of a group on some of the pilots, trained and scored."""
        work, steps = self.open(base, group, subjects), waves(group.variants)
        self.draw_priors(base, work, subjects)
        for variants in steps:
            for variant in variants:
                self.hand_over(shorter(variant, group.variants), variant, subjects)
            names = {variant.name for variant in variants}
            rows = [row for row in work.subjects if work.folder(row).parent.parent.name in names]
            settings = base.settings.replaced("checkpoint.last", len(steps) > 1)
            settings = settings.replaced("engine.packed.size", filled(settings.engine.packed.size, len(rows)))
            train_subjects(replace(base, settings=settings), replace(work, subjects=rows), self.watch, self.ended(work))
        how = self.protocol
        if how.protocol == "quick":
            how = replace(how, images=how.images or group.config.sample.images or None)
        return self.score(base, work, how, warm_judge(how.identity, how.clip, base.world.device, how.distance))

    def hand_over(self, before: Variant | None, variant: Variant, subjects: Sequence[Subject]) -> None:
        """Give a variant the state in which a shorter one ended, subject by subject: with a constant rate the longer
        training passes through it."""
        if before is None:
            return
        for subject in subjects:
            ended, own = (
                checkpoint_folder(folder_of(self.out, one.name, subject.id) / "checkpoints", before.config.train.steps)
                for one in (before, variant)
            )
            if ended.exists() and not own.exists():
                own.parent.mkdir(parents=True, exist_ok=True)
                ended.rename(own)

    def drop(self, rows: Sequence[Row], variants: Sequence[Variant]) -> None:
        """Drop the variants that are clearly worse than another, and say so."""
        for name, reason in worse(rows, variants, self.goal).items():
            self.dropped[name] = reason
            self.watch.say(f"{name}: dropped: {reason}")

    def shared_settings(self, config: RunConfig) -> RunConfig:
        """A group's settings with the places that all groups share."""
        for key, place in (("prior.store", self.out / "priors"), ("identifier.registry", self.out / REGISTRY)):
            section, _, name = key.partition(".")
            if getattr(getattr(config, section), name) is None:
                config = config.replaced(key, str(place.absolute()))
        return config.replaced("sample.images", 0)  # pictures of all variants are drawn together, when they are scored

    def base_for(self, config: RunConfig, before: Base | None) -> Base:
        """The base that a group trains on: the one that is loaded, if it was loaded in the same way."""
        if before is None or _loading(before.settings) != _loading(config):
            with self.watch.clock.stage("load"):
                # With its text encoders, which a run of trainings alone would put away: pictures are drawn as well.
                base = Base.load(config, start_world())
            self.watch.stop.listen()
            return base
        # Encoded class images depend on more settings than their key names, so groups do not share them.
        return replace(before, settings=config, class_priors=PriorCache(CLASSES))

    def open(self, base: Base, group: Group, subjects: Sequence[Subject]) -> Rows:
        """The rows of a group. The photos are sharded once for each resolution. Long trainings come first, so that a
        pack's rows end together."""
        folder = self.out / f"{base.settings.data.resolution}px"
        work = open_work(base, self.watch, self.subjects, (), folder, [subject.id for subject in subjects])
        places = {
            replace(subject, **own_values(variant)): folder_of(self.out, variant.name, subject.id)
            for variant in group.variants
            for subject in work.subjects
        }
        rows = sorted(places, key=lambda row: -(row.steps or base.settings.train.steps))
        return Rows(rows, work.identifiers, work.index, work.out, work.shards, work.priors, places=places)

    def draw_priors(self, base: Base, work: Rows, subjects: Sequence[Subject]) -> None:
        """Complete the class images, and note the seconds that an image takes, by what decides it."""
        config, prior = base.settings, base.settings.prior
        if not prior.weight or prior.sampler == IMPORTED:
            return
        begin, drawn = time.perf_counter(), 0
        with sampling_mode(base.models):
            for noun in dict.fromkeys(subject.class_noun for subject in subjects):
                key = prior_key(config, base.models, noun)
                chosen = (base.family, base.models, base.world, prior.batch)
                drawn += make_priors(work.priors, key, prior.images, *chosen, stop=lambda: self.watch.stop.asked)
        if drawn:
            known = read_json(self.out / PRIORS)
            known[_drawing(config)] = (time.perf_counter() - begin) / drawn
            write_file(self.out / PRIORS, json.dumps(known, indent=1).encode())

    def ended(self, work: Rows) -> Callable[[Subject, dict[str, Any] | DbtrainError], None]:
        """What is done with the outcome of a row."""

        def finished(subject: Subject, outcome: dict[str, Any] | DbtrainError) -> None:
            name = _name(work.folder(subject))
            if isinstance(outcome, DbtrainError):
                self.failed[name] = str(outcome)
                self.watch.say(f"{name}: failed: {outcome}")

        return finished

    def score(self, base: Base, work: Rows, how: Protocol, judge: Judge) -> list[Row]:
        """The scores of a group's finished rows: pictures of many rows are drawn together, each once."""
        shards = work.shards if isinstance(work.shards, Path) else None
        protocol = replace(how, shards=shards, base_pictures=self.out / "base")
        folders = {work.folder(row): row for row in work.subjects if (work.folder(row) / RECORD).exists()}
        new = [folder for folder in folders if not is_scored(folder, base, protocol, judge)]
        draw_together(new, base.models, base.family, protocol)
        rows = []
        for folder, subject in folders.items():
            try:
                if folder in new:
                    evaluate_finished(folder, base.models, base.family, protocol, judge)
                    self.watch.say(f"{_name(folder)}: scored")
                rows.append(read_row(folder, subject.class_noun))
            except DbtrainError as error:
                self.failed[_name(folder)] = str(error)
        return rows


warm_judge = cache(load_judge)
"""The encoders, loaded once."""


def rounds(subjects: int) -> list[int]:
    """Numbers of subjects that are reached one after another: FEWEST, twice as many each time, and all of them."""
    counts = [FEWEST]
    while counts[-1] * 2 < subjects:
        counts.append(counts[-1] * 2)
    return [*(count for count in counts if count < subjects), subjects]


def filled(size: int | Literal["auto"], rows: int) -> int | Literal["auto"]:
    """The smallest size of packs that trains so many rows in as few packs as `size` does: a pack runs all its rows,
    and those that are empty cost what the others do. It counts rows that are finished, too, so that what is lost is
    made anew in a pack of the same size."""
    return size if size == "auto" else -(-rows // -(-rows // size))


def folder_of(out: Path, variant: str, subject: str) -> Path:
    """The folder of a row's results in a study's folder."""
    return out / "variants" / variant / "subjects" / subject


def _loading(config: RunConfig) -> tuple[Any, ...]:
    """What decides how a base is loaded."""
    return config.model, config.train.method, config.train.precision, config.engine


def _drawing(config: RunConfig) -> str:
    """A text of all that decides what a class image costs."""
    prior = config.prior.model_dump(mode="json", include={"sampler", "steps", "guidance", "batch"})
    return json.dumps({**prior, "resolution": config.data.resolution, "precision": config.train.precision})


def prior_seconds(out: Path, config: RunConfig) -> float | None:
    """Device-seconds of a class's images under some settings; 0 without priors, None where none were drawn here."""
    if not config.prior.weight:
        return 0.0
    seconds = read_json(out / PRIORS).get(_drawing(config))
    return None if seconds is None else seconds * config.prior.images


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def is_scored(folder: Path, base: Base, protocol: Protocol, judge: Judge) -> bool:
    """Whether a row has scores of this very training, by this very protocol and these encoders."""
    found = read_json(folder / RESULT)
    try:
        record, config, wanted, *_ = planned(folder, base.models, protocol)
    except DbtrainError:
        return False
    wanted_about = {**about(record, config, wanted, protocol), "encoders": judge.names}
    return wanted_about == {key: found.get(key) for key in wanted_about}


def read_row(folder: Path, class_noun: str) -> Row:
    """What a finished and scored row came to."""
    record, scores = finished_record(folder), read_json(folder / RESULT)["scores"]
    cost = sum(record["stages_s"].get(stage, 0.0) for stage in OWN_STAGES)
    values = {name: cell["value"] for name, cell in scores.items() if cell["value"] is not None}
    steps, begun_at = record["steps"], record.get("begun_at", 0)
    return Row(folder.parent.parent.name, folder.name, class_noun, cost, values, steps, begun_at)


def even_costs(rows: Sequence[Row]) -> list[Row]:
    """The rows of a group with its whole cost shared out by steps.

    A step of a pack costs each of its rows the same, those too that a shorter training made for a longer one. What
    single rows were charged also depends on what else the machine did in their time, and that is no difference between
    recipes.
    """
    seconds, steps = sum(row.cost_s for row in rows), sum(row.steps - row.begun_at for row in rows)
    return [replace(row, cost_s=seconds * row.steps / steps) for row in rows]


def refuse_own_values(subjects: Sequence[Subject], variants: Sequence[Variant]) -> None:
    """Raise DataError where a subject has a value of its own for what the study varies: it would hold in every
    variant."""
    fields = {name for variant in variants for name in own_values(variant)}
    for subject in subjects:
        for name in sorted(fields):
            if getattr(subject, name) is not None:
                raise DataError(
                    f"{subject.id}: the manifest gives it {name} {getattr(subject, name)}, which the study varies; "
                    "take that column out of the pilot manifest"
                )


def _name(folder: Path) -> str:
    return f"{folder.parent.parent.name}/{folder.name}"
