"""A trainer's command line in parts, the settings that follow from it, and what trainers' flags have in common."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

from dbtrain.errors import ConfigError
from dbtrain.settings import recipes, yaml12

ADAMW_RATE = "1e-4"
"""Rate in place of an adaptive optimizer's, which is a factor near 1."""
ADAPTIVE = re.compile("prodigy|dadapt|adafactor", re.I)
"""Optimizers that find their own rate."""


@dataclass
class Command:
    """A command line: program, flags and defaults as text; settings, notes and dropped flags that follow from them."""

    program: str
    flags: dict[str, str]
    defaults: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def get(self, flag: str) -> str:
        """A flag's value as text; empty for a switch and for what is not given."""
        return self.flags.get(flag, self.defaults.get(flag, ""))

    def number(self, flag: str, default: float) -> Any:
        """A flag's value; ConfigError unless it is a number above 0."""
        value = plain(self.get(flag))
        if value == "":
            return default
        if isinstance(value, str) or value <= 0:
            raise ConfigError(f"migrate: --{flag}: got {value!r}, want a number > 0")
        return value

    def drop(self, flag: str, reason: str) -> None:
        """Say that a flag is left out, and why."""
        value = self.flags.get(flag, "")
        self.dropped.append(f"--{flag}{' ' if value else ''}{value}: {reason}")

    def take(self, key: str, value: str) -> None:
        """Set a setting to a flag's value."""
        self.settings[key] = value if recipes.describe(key).startswith("text") else plain(value)

    def take_all(
        self,
        switches: Mapping[str, tuple[str, Any]],
        keys: Mapping[str, str],
        used: Collection[str],
        dropped: Mapping[str, str],
    ) -> None:
        """Take over every flag, given or by default, that a trainer's tables know; a given one that they do not know is
        dropped.

        switches: flag -> setting and its value. keys: flag -> setting that has the flag's value. used: flags that are
        read elsewhere. dropped: flag -> why it is left out.
        """
        for flag, value in {**self.defaults, **self.flags}.items():
            if flag in switches:
                key, setting = switches[flag]
                self.settings[key] = setting
            elif flag in keys:
                self.take(keys[flag], value)
            elif flag in self.flags and flag not in used:
                self.drop(flag, dropped.get(flag, "unknown to dbtrain"))


class Migration(NamedTuple):
    """A command line's recipe and manifest as YAML; `dropped` flags with reasons, `notes` on what to look at."""

    recipe_yaml: str
    manifest_yaml: str
    dropped: list[str]
    notes: list[str]


def migration(command: Command, rows: list[dict[str, Any]], of: str) -> Migration:
    """What a command became. Raises ConfigError for values that no run could have."""
    recipe = f"# From a command line of {of} {command.program}, by `dbtrain migrate`.\n"
    recipe += yaml12.dump(nested(command.settings))
    recipes.loads(recipe, "migrated recipe")
    manifest = yaml12.dump(rows)
    for name in sorted(set(re.findall(r"\$\{?(\w+)", recipe + manifest))):
        command.notes.append(f"${name} was not set in the text; replace it in recipe or manifest")
    return Migration(recipe, manifest, command.dropped, command.notes)


def plain(text: str) -> Any:
    """A flag's value as a number where it is one."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted settings as a tree in the order of the schema, without those that equal dbtrain's defaults."""
    default = recipes.load()
    tree: dict[str, Any] = {}
    for key in recipes.known_keys():
        if key in settings and settings[key] != reduce(getattr, key.split("."), default):
            *sections, last = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = settings[key]
    return tree


def by_flag(reasons: dict[str, str]) -> dict[str, str]:
    """A reason for each flag, of reasons by flags with spaces between them."""
    return {flag: reason for flags, reason in reasons.items() for flag in flags.split()}


def processes(command: Command) -> int:
    """Processes that the launcher was to start."""
    number = command.number
    return number("num_processes", 0) or (
        (number("nproc_per_node", 0) or number("num_gpus", 1)) * (number("nnodes", 0) or number("num_nodes", 1))
    )


def set_schedule(command: Command) -> None:
    """Set learning-rate schedule and warm-up. A plain `constant` has no warm-up, whatever the flag says."""
    name, warmup = command.get("lr_scheduler"), plain(command.get("lr_warmup_steps"))
    nearest = {"cosine_with_restarts": "cosine", "polynomial": "linear", "piecewise_constant": "constant",
               "constant_with_warmup": "constant"}  # fmt: skip
    command.settings["train.schedule"] = nearest.get(name, name)
    if name in nearest and name != "constant_with_warmup":
        command.drop("lr_scheduler", f"not available; {command.settings['train.schedule']} is the nearest")
    steps = command.settings.get("train.steps", recipes.load().train.steps)
    if isinstance(warmup, float) and 0 < warmup < 1 and isinstance(steps, int):
        warmup = round(warmup * steps)  # kohya's share of the steps
    if name != "constant" and isinstance(warmup, int) and isinstance(steps, int):
        command.settings["train.warmup_steps"] = max(0, min(warmup, steps - 1))
        if warmup >= steps:
            command.notes.append(f"a warm-up of {warmup} steps never ends in {steps}; it is cut to {max(0, steps - 1)}")


def set_precision(command: Command) -> None:
    """Set the number format of the computation, and of a large frozen base with it."""
    name = command.get("mixed_precision")
    command.settings["train.precision"] = {"no": "fp32"}.get(name, name)
    if name == "fp16":
        command.notes.append("fp16 scales the loss; on a GPU that has it, train.precision=bf16 needs no scaling")


def set_eight_bits(command: Command) -> None:
    """Keep AdamW's moments in 8 bits where all weights train."""
    if command.settings.get("train.method") == "full":
        command.settings["train.optimizer"] = "adamw8bit"
    else:
        command.notes.append("optimizer states are fp32; those of an adapter are small")


def set_optimizer(command: Command, flag: str, rates: dict[str, str]) -> None:
    """Take AdamW in place of another optimizer; a rate that means nothing to it becomes AdamW's. rates: a flag's
    setting."""
    name = command.get(flag)
    if not name or name.lower().replace("8bit", "") in ("adamw", "torch.optim.adamw"):
        return
    command.drop(flag, f"AdamW only; {name}'s rate is another quantity, so look at train.lr")
    if not ADAPTIVE.search(name):
        return
    for rate, key in rates.items():
        if key in command.settings:
            command.flags[rate] = ADAMW_RATE
            command.settings[key] = float(ADAMW_RATE)
            command.notes.append(f"--{rate} is a factor of {name}'s own rate; {key} is AdamW's {ADAMW_RATE}")


def set_trackers(command: Command, flag: str) -> None:
    """Set where measurements go."""
    trackers = re.split(r"[\s,]+", command.get(flag))
    for name in ("wandb", "trackio"):
        if name in trackers or "all" in trackers:
            command.settings[f"track.{name}"] = "dreambooth"
    for name in set(trackers) - {"", "all", "none", "tensorboard", "wandb", "trackio"}:
        command.drop(flag, f"no {name}; TensorBoard, wandb and trackio are available")


def set_min_snr(command: Command, flag: str) -> None:
    """Set the Min-SNR weighting."""
    if flag in command.flags:
        command.settings["objective.weighting"] = "min_snr"


def suit_family(command: Command, row: Any) -> None:
    """Leave out what a family cannot do, and take its sampler, steps and guidance from its shipped recipe."""
    settings = command.settings
    settings["model.family"] = row.name
    if settings.get("train.text_encoder") and not row.trains_text:
        del settings["train.text_encoder"]
        settings.pop("train.text_encoder_lr", None)
        settings.pop("lora.text_targets", None)
        flag = "train_text_encoder" if "train_text_encoder" in command.flags else "text_encoder_lr"
        command.drop(flag, f"diffusers loads no adapter of some text encoder of {row.name}")
    if row.denoiser != "unet" and settings.get("model.attention") == "xformers":
        del settings["model.attention"]
        command.drop("xformers", f"xformers is for U-Nets; {row.name} takes PyTorch's own pick")
    if row.denoiser != "unet" and settings.get("train.precision") == "fp16":
        settings["train.precision"] = "bf16"
        command.notes.append(f"fp16 becomes bf16, the format of {row.name}'s published weights; T5 overflows in fp16")
    if row.denoiser != "unet" and settings.get("train.precision") == "bf16" and settings["train.method"] == "lora":
        settings["model.dtype"] = "bf16"
    own = recipes.shipped_for(row.name)
    for key in ("prior.sampler", "prior.steps", "prior.guidance", "sample.steps", "sample.guidance") if own else ():
        settings.setdefault(key, reduce(getattr, key.split("."), own))
