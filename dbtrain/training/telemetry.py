"""Measurements and where they go: a JSON-lines file, TensorBoard, wandb or trackio, and the screen."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from dbtrain.errors import ConfigError
from dbtrain.settings.config import RunConfig, TrackConfig

LOG = "log.jsonl"


class Sink(Protocol):
    """A place for the measurements of a run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the values of a step."""

    def close(self) -> None:
        """Flush and let go."""


class JsonLines:
    """`log.jsonl`: one object a line, appended, so that a resumed run continues the file."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line and flush it."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def refuse_trackers(track: TrackConfig) -> None:
    """Raise ConfigError for trackers that are asked for and not installed; none is loaded."""
    missing = [name for name in ("wandb", "trackio") if getattr(track, name) and find_spec(name) is None]
    if missing:
        raise ConfigError([MISSING.format(name=name) for name in missing])


MISSING = "track.{name}: {name} is not installed; pip install 'dbtrain[trackers]', or set track.{name}=null"


class TensorBoard:
    """TensorBoard event files under `tensorboard/`, with the run's settings as text."""

    def __init__(self, path: Path, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(path))
        self.writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        """One scalar a value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events."""
        self.writer.close()


class Tracker:
    """wandb, or trackio, which has the same three calls."""

    def __init__(self, module: str, project: str, run: str, settings: dict):
        try:
            self.api = __import__(module)
        except ImportError as error:
            raise ConfigError(MISSING.format(name=module)) from error
        self.api.init(project=project, name=run, config=settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values."""
        self.api.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.api.finish()


def open_sinks(config: RunConfig, folder: Path, run: str) -> list[Sink]:
    """The sinks that a run asked for, in a subject's folder. The log is always among them."""
    settings = config.model_dump(mode="json")
    sinks: list[Sink] = [JsonLines(folder / LOG)]
    if config.track.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", settings))
    for name in ("wandb", "trackio"):
        if project := getattr(config.track, name):
            sinks.append(Tracker(name, project, run, settings))
    return sinks


class Meter:
    """Rates over the steps since the last log line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.start, self.wait_s, self.images, self.steps = time.perf_counter(), 0.0, 0, 0
        self.sums: dict[str, float] = {}

    def add(self, images: int, wait_s: float, values: dict[str, float], steps: int = 1) -> None:
        """Count a step, or several together."""
        self.images, self.wait_s, self.steps = self.images + images, self.wait_s + wait_s, self.steps + steps
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        """Means of the values, and images/s, steps/s and the share of time spent waiting for data."""
        passed = max(time.perf_counter() - self.start, 1e-9)
        means = {name: total / self.steps for name, total in self.sums.items()}
        rates = {"images_per_s": self.images / passed, "steps_per_s": self.steps / passed}
        return {**means, **rates, "data_wait_share": self.wait_s / passed}


def peak_memory_gib(device: str) -> float:
    """Most memory this process has held: device memory on a GPU, resident memory on a CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Progress:
    """What a person sees while a subject trains: a live bar on a terminal, plain lines otherwise."""

    def __init__(self, subject: str, steps: int, done: int, quiet: bool = False):
        self.subject, self.steps, self.quiet = subject, steps, quiet
        self.bar = self._live_bar(done) if sys.stderr.isatty() and not quiet else None

    def _live_bar(self, done: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Live

        live = Live(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = live.add_task(self.subject, total=self.steps, completed=done, status="")
        live.start()
        return live

    def advance(self, step: int) -> None:
        """Move the bar, if there is one."""
        if self.bar:
            self.bar.update(self.task, completed=step)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Show a log interval's values."""
        eta_s = (self.steps - step) / values["steps_per_s"]
        status = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.1e}  {values['images_per_s']:.1f} images/s  "
            f"wait {values['data_wait_share']:.0%}  {values['memory_gib']:.1f} GiB"
        )
        if self.bar:
            self.bar.update(self.task, completed=step, status=status)
        elif not self.quiet:
            print(f"{self.subject}  {step}/{self.steps}  {status}  ETA {eta_s:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar:
            self.bar.stop()
