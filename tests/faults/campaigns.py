"""What the fault campaigns do: work to disturb, how results are compared, and the counts that come out.

`tests/faults/test_campaigns.py` runs a small part of each, `benchmarks/faults.py` all of them.
"""

import errno
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image

from dbtrain.data.formats import readable
from dbtrain.data.index import Index
from dbtrain.data.shards import MARK
from dbtrain.data.stream import read_samples, verify
from dbtrain.errors import DataError, DbtrainError, summed
from dbtrain.results.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    save_checkpoint,
    tidy_checkpoints,
    verify_checkpoint,
)
from dbtrain.results.identity import Identity
from dbtrain.storage.atomic import TEMPORARY, file_digest
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.preflight import sift
from dbtrain.subjects.sharding import shard_subjects
from tests.faults.damage import DAMAGES
from tests.faults.kit import Fault, forked, trace
from tests.kit.main_job import photo, small_config, write_job

RUN = "a" * 64
TIMED = ("record.json", "log.jsonl")
"""Files that hold times; everything else of a result must agree to the bit."""

ENDS = {"kill": (-9,), "cut": (-9,), "SIGTERM": (75, 0), "SIGUSR1": (75, 0)}
"""Exit codes that each fault may end in; other faults in 3, or 0 where the operation did not matter."""


@dataclass
class Tally:
    """Outcomes of one campaign; `wrong` describes every case that did not end as it must."""

    name: str
    cases: int = 0
    good: int = 0
    operations: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, good: bool, what: str) -> None:
        self.cases += 1
        self.good += good
        if not good:
            self.wrong.append(what)

    def row(self) -> dict:
        return asdict(self)


def result_of(root: Path, checkpoints: bool = True) -> dict[str, str]:
    """Digests of everything a run left under `root`: no locks, nothing with times in it; or no checkpoints either."""
    return {
        path.relative_to(root).as_posix(): file_digest(path)
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not path.name.endswith(".lock")
        and path.name not in TIMED
        and (checkpoints or "checkpoints" not in path.parts)
    }


def half_written(root: Path) -> list[str]:
    """Remains of unfinished writes."""
    return [str(path) for path in root.rglob("*") if path.name.endswith(TEMPORARY) or path.name == MARK]


def disturb(
    name: str,
    work: Callable[[], object],
    root: Path,
    action: str,
    stride: int = 1,
    forever: bool = False,
    timeout: float = 300,
) -> Tally:
    """Strike at every `stride`-th file operation of `work` below `root`, then do the same work again undisturbed.

    Good: the strike ended the work as it must (see `ENDS`) without a traceback, and the second time gives the digests
    of a run that nobody disturbed, with nothing half-written left. A pack's writer goes on after a checkpoint that
    failed, and the subject may be finished without it: after an error its checkpoints are not compared.
    """
    compared = not (name == "packed" and action not in ENDS)
    tally = Tally(f"{name}: {action}{' from then on' if forever else ''}")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    tally.operations = len(trace(work, root, timeout))
    wanted = result_of(root, compared)
    for at in range(1, tally.operations + 1, stride):
        shutil.rmtree(root)
        root.mkdir()
        struck = forked(work, Fault(action, at, forever=forever), root, timeout)
        ended = struck.code in ENDS.get(action, (0, 3)) and "Traceback" not in struck.stderr
        # With 3 it must be the ordered failure that is told, and none that followed from it.
        ended &= struck.code != 3 or os.strerror(getattr(errno, action)) in struck.stderr
        again = forked(work, None, root, timeout)
        last = struck.operations[-1] if struck.operations else "?"
        got = result_of(root, compared)
        differing = sorted(path for path in wanted.keys() | got.keys() if wanted.get(path) != got.get(path))
        good = ended and again.code == 0 and not differing and not half_written(root)
        tally.count(
            good,
            f"operation {at} ({last}): ended {struck.code}, again {again.code}, differing {differing[:4]}, "
            f"half-written {half_written(root)[:2]}; {struck.stderr[-300:] if not ended else again.stderr[-300:]}",
        )
    return tally


class Works:
    """The pieces of work that campaigns disturb, each on a folder of its own; models are loaded once, before forks."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "input").mkdir(parents=True)
        write_job(folder / "input", subjects="rex:dog tom:cat")
        rex = folder / "input" / "rex"
        Image.linear_gradient("L").resize((48, 40)).save(rex / "0-mask.png")
        (rex / "0.txt").write_text("a {subject} in a box")
        self.manifest = folder / "input" / "photos.csv"
        # The random autoencoder has cells of 2 pixels, and Stable Diffusion's row says 8: no training with masks here.
        self.settings = ("train.steps=3", "checkpoint.every_steps=1", "prior.images=2", "sample.images=1",
                         "data.mask=false")  # fmt: skip

    def shards(self, root: Path) -> Callable[[], object]:
        config = small_config()
        return lambda: shard_subjects(*scan_manifest(self.manifest), root / "shards", config, str)

    def checkpoints(self, root: Path) -> Callable[[], object]:
        """Four steps with a checkpoint each, two kept; begun again from the newest good one."""

        def work():
            tidy_checkpoints(root / "checkpoints", keep=2)
            found, _ = latest_checkpoint(root / "checkpoints", Identity(RUN))
            for step in range(step_of(found) + 1 if found else 1, 5):
                save_checkpoint(root / "checkpoints", checkpoint(step), keep=2)

        return work

    def priors(self, root: Path, images: int = 18) -> Callable[[], object]:
        """Two blocks of priors of a random model, drawn in the child."""
        from dbtrain.engines.world import World
        from dbtrain.families import FAMILIES
        from dbtrain.models.load import load_models
        from dbtrain.priors.draw import make_priors
        from dbtrain.priors.store import prior_key, read_priors

        config, family = small_config("prior.steps=1"), FAMILIES["sd"]
        models = load_models(family, config.model)
        key = prior_key(config, models, "dog")

        def work():
            make_priors(root / "store", key, images, family, models, World(0, 1, "cpu"), 8)
            assert len(read_priors(root / "store", key, images)) == images

        return work

    def import_priors(self, root: Path) -> Callable[[], object]:
        from dbtrain.priors.own_images import import_images

        config = small_config()
        return lambda: import_images(self.folder / "input" / "rex", "dog", root / "store", config)

    def import_kohya(self, root: Path) -> Callable[[], object]:
        """A folder for kohya's trainers: its class images into a store, then its manifest, which is never replaced."""
        from dbtrain.priors.own_images import import_images
        from dbtrain.subjects.foreign import from_kohya, import_class_images

        folder, config = self.folder / "kohya", small_config()
        for source, place in (("rex", "img/10_zorbo dog"), ("tom", "reg/1_dog")):
            shutil.copytree(self.folder / "input" / source, folder / place, dirs_exist_ok=True)

        def work():
            imported, manifest = from_kohya(folder), root / "manifest.jsonl"
            import_class_images(imported, lambda place, noun: import_images(place, noun, root / "store", config))
            if not manifest.exists():
                imported.write(manifest)
            assert len(scan_manifest(manifest)[0]) == 1

        return work

    def index_tar(self, root: Path) -> Callable[[], object]:
        """A tar made elsewhere, copied into shards."""
        from dbtrain.subjects.tars import index_tars

        path, data = self.folder / "rex.tar", small_config().data
        with tarfile.open(path, "w") as file:
            for name in ("0.jpg", "0.txt", "1.jpg"):
                file.add(self.folder / "input" / "rex" / name, name)
        return lambda: index_tars([path], "rex", "dog", data, root / "shards", str)

    def train(self, root: Path) -> Callable[[], object]:
        """A whole run: shards, priors, encoded priors, three steps with checkpoints, samples, publishing."""
        return self._run(root, ["rex"])

    def packed(self, root: Path) -> Callable[[], object]:
        """The same for two subjects in one pack: one thread fills banks and another writes results meanwhile."""
        return self._run(root, ["rex", "tom"], "engine.kind=packed", "engine.packed.size=2")

    def _run(self, root: Path, subjects: list[str], *settings: str) -> Callable[[], object]:
        import deepspeed  # noqa: F401  before the forks, as it takes seconds
        import torch.distributed as dist

        import dbtrain.packing.loop  # noqa: F401
        from dbtrain.train import train_manifest
        from dbtrain.verbs.options import stop_at_once

        config = small_config(*self.settings, *settings)

        def work():
            # A fork has none of its parent's threads: it would wait for them for ever.
            assert not dist.is_initialized(), "work that trains was forked from a process that had trained"
            stop_at_once()
            _, failed = train_manifest(self.manifest, config, root / "out", subjects, quiet=True)
            if failed:
                raise summed(failed)

        return work


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder, which has agreed with the one inside."""
    return int(folder.name.split("-")[1])


def checkpoint(step: int, size: int = 200) -> Checkpoint:
    chance = torch.Generator().manual_seed(step)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    return Checkpoint(step, RUN, {kind: {"unet.a": torch.randn(size, generator=chance)} for kind in kinds})


def damage_checkpoints(root: Path, flips: int, truncations: int, seed: int = 0) -> Tally:
    """Damage to the newest of two checkpoints: it must be passed over with a word, and the one before be taken."""
    tally, chance = Tally("checkpoint damage"), random.Random(seed)
    for step in (1, 2):
        save_checkpoint(root, checkpoint(step), keep=2)
    folder = root / "step-00000002"
    files = sorted(folder.iterdir())
    for name, times in (("flip", flips), ("truncate", truncations)):
        for case in range(times):
            path = files[case % len(files)]
            sound = path.read_bytes()
            what = DAMAGES[name](path, chance)
            found, notes = latest_checkpoint(root, Identity(RUN))
            tally.count(found is not None and step_of(found) == 1 and len(notes) == 1, f"{path.name} {what}")
            path.write_bytes(sound)
    assert verify_checkpoint(folder) is None
    for what, (good_step, harm) in mixups(root, folder).items():
        aside = shutil.copytree(root, root.with_name("aside"))
        harm()
        found, notes = latest_checkpoint(root, Identity(RUN))
        tally.count(found is not None and step_of(found) == good_step and bool(notes), what)
        shutil.rmtree(root)
        aside.rename(root)
    return tally


def mixups(root: Path, folder: Path) -> dict[str, tuple[int, Callable[[], object]]]:
    """Files that are missing, exchanged, extra or garbage, by what they are: (step to be found then, the harm)."""
    other = root / "step-00000001"
    harms: dict[str, tuple[int, Callable[[], object]]] = {
        "an extra file": (1, lambda: (folder / "state.pkl").write_bytes(b"\x80\x04.")),
        "a checkpoint under a later name": (1, lambda: (shutil.rmtree(folder), shutil.copytree(other, folder))),
        "an empty folder as the newest": (2, lambda: (root / "step-00000009").mkdir()),
        "a file as the newest": (2, lambda: (root / "step-00000009").write_bytes(b"latest")),
        "a number of garbage": (2, lambda: shutil.copytree(other, root / "step-99999999")),
    }
    for path in sorted(folder.iterdir()):
        harms[f"{path.name} missing"] = (1, path.unlink)
        harms[f"{path.name} of another step"] = (1, lambda path=path: shutil.copy(other / path.name, path))
        harms[f"{path.name} a link"] = (1, lambda path=path: (path.unlink(), path.symlink_to("/etc/hostname")))
    return harms


def damage_shards(folder: Path, times: int, seed: int = 0, kinds: Iterable[str] = DAMAGES) -> Tally:
    """Damage to a sound shard folder: `verify` must say so, and reading must raise or give the very samples."""
    tally, chance = Tally("shard damage"), random.Random(seed)
    wanted = list(read_samples(folder, Index.load(folder).entries))
    files = sorted(folder.iterdir())
    for name in kinds:
        for case in range(times):
            path = files[case % len(files)]
            sound = path.read_bytes()
            what = DAMAGES[name](path, chance)
            try:
                same = list(read_samples(folder, Index.load(folder).entries)) == wanted
            except DataError:
                same = True
            tally.count(same and verify(folder) != [], f"{path.name} {what}: read {same}, verify {verify(folder)}")
            path.write_bytes(sound)
    return tally


def make_sources(folder: Path) -> Path:
    """A manifest of a subject whose photos bring along all that photos may: masks, texts, a table, another format."""
    (folder / "rex").mkdir(parents=True)
    for number, name in enumerate(["0.jpg", "1.png", "2.webp", *(["3.heic"] if "HEIC" in readable() else [])]):
        photo(number).save(folder / "rex" / name)
    mask = Image.linear_gradient("L").resize((48, 40))
    mask.save(folder / "rex" / "0-mask.png")
    mask.save(folder / "column.png")
    (folder / "rex" / "0.txt").write_text("a {subject} in a box")
    rows = [{"file_name": name, "text": f"a {{subject}}, {name}"} for name in ("1.png", "2.webp")]
    (folder / "rex" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copy(folder / "rex" / "1.png", folder / "tom.png")
    rows = [{"subject": "rex", "class": "dog", "images": "rex"},
            {"subject": "tom", "class": "dog", "images": "tom.png", "mask": "column.png"}]  # fmt: skip
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "m.jsonl"


def damage_sources(folder: Path, times: int, seed: int = 0) -> Tally:
    """Damage to a user's own files after shards were made of them: preflight and sharding end in a line or none, and
    sharding does not take them for the files that it has stored."""
    tally, chance = Tally("damage to photos, masks and captions"), random.Random(seed)
    manifest, config, out = make_sources(folder / "input"), small_config(), folder / "shards"
    shard_subjects(*scan_manifest(manifest), out, config, str)
    stored = result_of(out)
    files = sorted(path for path in (folder / "input").rglob("*") if path.is_file() and path != manifest)
    for name, harm in DAMAGES.items():
        for case in range(times):
            path = files[case % len(files)]
            sound = path.read_bytes()
            what = f"{path.name} {name} {harm(path, chance)}"
            try:
                sift(*scan_manifest(manifest), config)
                shard_subjects(*scan_manifest(manifest), out, config, str)
                tally.count(False, f"{what}: was taken for the same")
            except DbtrainError as error:
                tally.count(result_of(out) == stored and str(error).isprintable(), f"{what}: {error}")
            except Exception as error:  # what a user would see as a traceback
                tally.count(False, f"{what}: {error!r}")
            path.write_bytes(sound)
    assert verify(out) == []
    return tally


def damage_priors(store: Path, times: int, seed: int = 0) -> Tally:
    """Damage to a prior store: `prior verify` must name it."""
    from dbtrain.priors.store import store_damage

    tally, chance = Tally("prior store damage"), random.Random(seed)
    assert store_damage(store) == []
    files = sorted(path for path in store.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    for name, harm in DAMAGES.items():
        for case in range(times):
            path = files[case % len(files)]
            sound = path.read_bytes()
            what = harm(path, chance)
            tally.count(store_damage(store) != [], f"{path.relative_to(store)} {name} {what}")
            path.write_bytes(sound)
    return tally


def make_manifest(folder: Path, subjects: int, photos: int) -> Path:
    """A manifest of many subjects with small JPEGs, for timing preflight."""
    rows = ["subject,class,images"]
    for number in range(subjects):
        place = folder / f"s{number}"
        place.mkdir(parents=True)
        for i in range(photos):
            photo(1000 * number + i, 640, 480).save(place / f"{i}.jpg", quality=85)
        rows.append(f"s{number},dog,s{number}")
    (folder / "photos.csv").write_text("\n".join(rows) + "\n")
    return folder / "photos.csv"
