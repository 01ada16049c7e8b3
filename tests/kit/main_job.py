"""The main job in small: a random Stable Diffusion, made-up photos, a recipe of a few steps, and ways to run it."""

import atexit
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

from dbtrain.settings.config import RunConfig
from dbtrain.settings.recipes import loads
from dbtrain.values import Role, Sample

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
data: {resolution: 32}
train: {steps: 4, batch: 4, lr: 1.0e-3}
lora: {rank: 2}
prior: {images: 3, steps: 2, guidance: 1, batch: 4}
sample: {steps: 2, images: 1, guidance: 1, prompts: ["a photo of {subject}"]}
track: {every_steps: 1, tensorboard: false}
"""


@cache
def sd_folder() -> Path:
    """A random Stable Diffusion on disk, made once a process."""
    from tests.kit.random_models import make_sd

    folder = Path(tempfile.mkdtemp(prefix="dbtrain-sd-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_sd(folder)


def small_config(*overrides: str) -> RunConfig:
    return loads(RECIPE, "small", [f"model.path={sd_folder()}", *overrides])


def photo(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Noise with an off-centre shape, so that no crop and no mirror image equals another."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    pen.ellipse((3, 3, width // 2, height // 2), fill=tuple(random.integers(0, 255, 3).tolist()))
    return image


def sample(number: int, role: Role = Role.INSTANCE, width: int = 48, height: int = 40) -> Sample:
    data = io.BytesIO()
    photo(number + 100 * int(role), width, height).save(data, "PNG")
    meta = {"width": width, "height": height}
    return Sample(f"rex-{int(role)}-{number}", "rex", role, "", data.getvalue(), "png", meta)


def write_job(folder: Path, *overrides: str, subjects: str = "rex:dog tom:cat") -> list[str]:
    """Photos, manifest and recipe in a folder; the words of the `train` command that uses them, but for `--out`."""
    rows = ["subject,class,images"]
    for number, pair in enumerate(subjects.split()):
        name, noun = pair.split(":")
        (folder / name).mkdir(parents=True)
        for i in range(2):
            photo(10 * number + i).save(folder / name / f"{i}.jpg", quality=90)
        rows.append(f"{name},{noun},{name}")
    (folder / "photos.csv").write_text("\n".join(rows) + "\n")
    (folder / "small.yaml").write_text(RECIPE)
    return [
        str(folder / "photos.csv"),
        *("--config", str(folder / "small.yaml")),
        f"model.path={sd_folder()}",
        *overrides,
    ]


def environment() -> dict[str, str]:
    """A user's environment for a checkout that is not installed, on one core."""
    roots = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "launchers"))
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    binaries = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PYTHONPATH": roots, "PATH": binaries, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def heed_ctrl_c() -> None:
    """For a process that begins: a shell's background jobs ignore Ctrl-C, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(words: list[str], **options) -> subprocess.Popen:
    """`dbtrain WORDS` as a process of its own."""
    command = [sys.executable, "-m", "dbtrain", *map(str, words)]
    options.setdefault("preexec_fn", heed_ctrl_c)
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def ended(process) -> SimpleNamespace:
    """What a process came to: returncode, stdout, stderr; never a traceback."""
    stdout, stderr = process.communicate(timeout=800)
    assert "Traceback" not in stderr, stderr
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


def dbtrain(words: list[str]) -> SimpleNamespace:
    """`dbtrain WORDS` to its end, as `ended` tells it."""
    return ended(start(words))


def inside(words: list):
    """`dbtrain WORDS` in this process, which spares seconds of imports: exit_code, stdout, stderr, output."""
    from typer.testing import CliRunner

    from dbtrain import cli
    from dbtrain.training.stopping import signals_as_before

    with signals_as_before():
        return CliRunner().invoke(cli.app, [str(word) for word in words])


@dataclass
class Rig:
    """An engine around a subject's training step, with what `train_step` needs."""

    engine: object
    bank: object
    plan: object
    config: RunConfig

    def steps(self, first: int, last: int) -> list[dict[str, float]]:
        from dbtrain.engines.capture import Capture, Eager
        from dbtrain.engines.engine import lr_scale
        from dbtrain.training.job import train_step
        from dbtrain.training.session import Stop

        train, eager = self.config.train, Eager(Capture("off", ""))
        return [
            train_step(self.engine, eager, self.bank, self.plan, step, lr_scale(step, train, train.steps), Stop())[0]
            for step in range(first, last)
        ]

    def state(self) -> dict:
        return self.engine.state()


def make_bank(config: RunConfig, priors: bool = True):
    from dbtrain.training.bank import Bank, Item

    items = {Role.INSTANCE: [Item(sample(i), "a photo of srx dog") for i in range(3)]}
    if priors:
        items[Role.PRIOR] = [Item(sample(i, Role.PRIOR), "a photo of a dog") for i in range(3)]
    return Bank(items, config.data, config.seed, "rex", config.train.batch)


@contextmanager
def rig(config: RunConfig):
    """A fresh rig of one process, closed afterwards."""
    from dbtrain.engines.engine import plan_batches
    from dbtrain.engines.world import start_world
    from dbtrain.engines.zero import ZeroEngine
    from dbtrain.randomness import stream_key
    from dbtrain.training.bank import captions_of
    from dbtrain.training.session import Base
    from dbtrain.training.step import TrainingStep
    from dbtrain.training.trainables import make_trainable

    world = start_world()
    plan = plan_batches(config.train.batch, config.train.micro_batch, world.size)
    base = Base.load(config, world)
    family, models = base.family, base.models
    bank = make_bank(config)
    for role in bank.items:
        bank.cache(role, bank.shapes[0], family.codec, models.vae, world.device)
    captions = captions_of(family, models, config, bank.texts, world.device)
    groups = make_trainable(family, models, config, "rex")
    module = TrainingStep(family, models, config, stream_key(config.seed, "rex"), captions)
    engine = ZeroEngine(module, groups, config, plan, world)
    try:
        yield Rig(engine, bank, plan, config)
    finally:
        engine.close()
