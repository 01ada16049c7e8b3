"""From a diffusers DreamBooth command line to a recipe and a manifest, with a list of what was left out and why.

Understood are `train_dreambooth.py`, `train_dreambooth_lora.py` and `train_dreambooth_lora_sdxl.py`, started by python,
accelerate, torchrun or deepspeed. Defaults of the scripts that differ from dbtrain's are written out, so that the
recipe trains what the command trained. Flags are those of diffusers 0.42 (examples/dreambooth).
"""

import re
from dataclasses import dataclass, field
from functools import reduce
from pathlib import PurePath
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.settings import recipes, yaml12
from dbtrain.verbs.shell_words import flags_of, shell_words


@dataclass(frozen=True)
class Migration:
    """A command line's recipe and manifest as YAML; `dropped` flags with reasons, `notes` on what to look at."""

    recipe_yaml: str
    manifest_yaml: str
    dropped: list[str]
    notes: list[str]


_COMMON = {"train_batch_size": "4", "gradient_accumulation_steps": "1", "num_class_images": "100",
           "sample_batch_size": "4", "prior_loss_weight": "1.0", "checkpointing_steps": "500",
           "lr_scheduler": "constant", "lr_warmup_steps": "500", "num_validation_images": "4", "mixed_precision": "no"}
SCRIPTS: dict[str, dict[str, str]] = {
    "train_dreambooth.py": {**_COMMON, "learning_rate": "5e-6", "resolution": "512"},
    "train_dreambooth_lora.py": {**_COMMON, "learning_rate": "5e-4", "resolution": "512", "rank": "4"},
    "train_dreambooth_lora_sdxl.py": {**_COMMON, "learning_rate": "1e-4", "resolution": "1024", "rank": "4"},
}
"""Scripts that can be migrated, with those of their defaults that decide a result."""

KEYS = {
    "pretrained_model_name_or_path": "model.path", "revision": "model.revision", "variant": "model.variant",
    "resolution": "data.resolution", "max_train_steps": "train.steps", "learning_rate": "train.lr",
    "text_encoder_lr": "train.text_encoder_lr", "adam_beta1": "train.beta1", "adam_beta2": "train.beta2",
    "adam_epsilon": "train.eps", "adam_weight_decay": "train.weight_decay", "max_grad_norm": "train.clip_norm",
    "train_batch_size": "train.micro_batch", "rank": "lora.rank", "lora_alpha": "lora.alpha",
    "snr_gamma": "objective.snr_gamma", "prior_loss_weight": "prior.weight", "num_class_images": "prior.images",
    "sample_batch_size": "prior.batch", "checkpointing_steps": "checkpoint.every_steps",
    "checkpoints_total_limit": "checkpoint.keep", "num_validation_images": "sample.images",
    "validation_steps": "sample.every_steps", "seed": "seed", "zero_stage": "engine.zero.stage",
}
"""Flags whose value is the value of a setting."""

SWITCHES: dict[str, tuple[str, Any]] = {
    "train_text_encoder": ("train.text_encoder", True), "random_flip": ("data.flip", True),
    "gradient_checkpointing": ("train.gradient_checkpointing", True), "offset_noise": ("objective.noise_offset", 0.1),
    "enable_xformers_memory_efficient_attention": ("model.attention", "xformers"),
}
"""Flags without a value, and the setting they stand for."""

DROPPED = {
    "class_data_dir": "class images are made by dbtrain, once per class; see prior.store",
    "resume_from_checkpoint": "running the same dbtrain command again resumes",
    "use_8bit_adam": "optimizer states are fp32; to save memory use engine.zero.stage or engine.zero.offload_optimizer",
    "num_train_epochs": "progress is counted in steps; set train.steps",
    "validation_epochs": "samples are scheduled in steps; set sample.every_steps",
    "dataset_name": "dbtrain reads folders of photos; download the data set and name its folder in the manifest",
    "dataloader_num_workers": "latents are cached, so loading needs no setting",
    "pretrained_vae_model_name_or_path": "the base's own VAE is used; put another one into a copy of the base folder",
    "tokenizer_name": "the base's own tokenizer is used",
    "output_dir": "given on the command line, as --out",
    "logging_dir": "logs lie in the output folder",
    "push_to_hub": "dbtrain uploads nothing; upload the output folder yourself", "hub_token": "dbtrain uploads nothing",
    "hub_model_id": "dbtrain uploads nothing",
    "allow_tf32": "a setting of the machine, not of the run",
    "prior_generation_precision": "class images are drawn in the run's precision",
    "pre_compute_text_embeddings": "always done while the text encoder is frozen (data.cache_text)",
    "set_grads_to_none": "always done", "use_dora": "plain LoRA only", "lora_dropout": "adapters have no dropout",
    "optimizer": "AdamW only", "lr_num_cycles": "no restarts", "lr_power": "no polynomial schedule",
    "output_kohya_format": "use `dbtrain export`", "do_edm_style_training": "the base's own parameterization is used",
    "config_file": "launcher settings are not read; give num_processes so that the global batch is right",
}
"""Flags without a setting of the same meaning, with the reason."""

USED = frozenset("""
    with_prior_preservation class_prompt instance_prompt instance_data_dir center_crop scale_lr validation_prompt
    gradient_accumulation_steps mixed_precision lr_scheduler lr_warmup_steps report_to num_processes num_machines
    nproc_per_node nnodes num_gpus num_nodes offload_optimizer_device offload_param_device use_deepspeed multi_gpu
    local_rank
""".split())
"""Flags that several settings follow from, or that say only how the script was started."""

_KINDS = "photo|photograph|picture|image|drawing|painting"
_PICTURE = re.compile(rf"(?:(?:an?|the)\s+)?(?:\w+\s+)?(?:{_KINDS})s?\s+of\s+", re.I)
_TAIL = re.compile(r"\s+(?:in|on|at|with|wearing|from|near|under|by|and|sitting|standing)\b.*|\s*[,.;].*", re.I)
_ARTICLE = re.compile(r"(?:an?|the)\s+", re.I)


@dataclass
class _Command:
    """A command line in parts, and the settings, notes and dropped flags that follow from it."""

    script: str
    flags: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def get(self, flag: str) -> str:
        return self.flags.get(flag, SCRIPTS[self.script].get(flag, ""))

    def number(self, flag: str, default: float) -> Any:
        value = _plain(self.get(flag))
        if value == "":
            return default
        if isinstance(value, str) or value <= 0:
            raise ConfigError(f"migrate: --{flag}: got {value!r}, want a number > 0")
        return value

    def drop(self, flag: str, reason: str) -> None:
        value = self.flags.get(flag, "")
        self.dropped.append(f"--{flag}{' ' if value else ''}{value}: {reason}")


def migrate(command_line: str) -> Migration:
    """Recipe and manifest of a diffusers command line.

    Raises ConfigError for another script, for a command without a base model, and for values no run could have.
    """
    command = _take_apart(command_line)
    for step in (_table, _batch, _schedule, _precision, _prior, _zero, _track):
        step(command)
    row = _captions(command)
    header = f"# From a command line of diffusers' {command.script}, by `dbtrain migrate`.\n"
    recipe = header + yaml12.dump(_nest(command.settings))
    recipes.loads(recipe, "migrated recipe")
    manifest = yaml12.dump([row])
    for name in sorted(set(re.findall(r"\$\{?(\w+)", recipe + manifest))):
        command.notes.append(f"${name} was not set in the text; replace it in recipe or manifest")
    return Migration(recipe, manifest, command.dropped, command.notes)


def _take_apart(command_line: str) -> _Command:
    words = shell_words(command_line)
    position = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if position is None:
        raise ConfigError("migrate: no script in the command line, want one of " + ", ".join(SCRIPTS))
    script = PurePath(words[position].replace("\\", "/")).name
    if script not in SCRIPTS:
        other = re.search(r"sd3|flux|sana|hidream|qwen|lumina|z_image", script)
        reason = f"dbtrain has no family for {other[0]} models" if other else "only these are understood"
        raise ConfigError(f"migrate: {script}: {reason}; want one of {', '.join(SCRIPTS)}")
    launcher, own = flags_of(words[:position]), flags_of(words[position + 1:])
    if "pretrained_model_name_or_path" not in own:
        raise ConfigError(f"migrate: {script} without --pretrained_model_name_or_path, want the base model")
    command = _Command(script, {**launcher, **own})
    if "accelerate" in words[:position] and "num_processes" not in launcher:
        command.notes.append("accelerate without --num_processes: taken as 1 process; correct train.batch if more")
    return command


def _plain(text: str) -> Any:
    """A flag's value as a number where it is one."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def _table(command: _Command) -> None:
    """Take over every flag that the tables above know."""
    command.settings["model.family"] = "sdxl" if "sdxl" in command.script else "sd"
    command.settings["train.method"] = "lora" if "lora" in command.script else "full"
    for flag, value in {**SCRIPTS[command.script], **command.flags}.items():
        if flag in SWITCHES:
            key, setting = SWITCHES[flag]
            command.settings[key] = setting
        elif flag in KEYS:
            is_text = recipes.describe(KEYS[flag]).startswith("text")
            command.settings[KEYS[flag]] = value if is_text else _plain(value)
        elif flag not in USED:
            command.drop(flag, DROPPED.get(flag, "unknown to dbtrain"))
    command.settings["data.crop"] = "center" if "center_crop" in command.flags else "random"
    if "center_crop" not in command.flags:
        command.notes.append("without --center_crop the script crops at random, so latents are not cached; "
                             "for (nearly) square photos data.crop=center gives the same and is faster")


def _batch(command: _Command) -> None:
    """Set global batch and learning rate from the number of processes and the accumulation."""
    processes = command.number("num_processes", 0) or (
        (command.number("nproc_per_node", 0) or command.number("num_gpus", 1))
        * (command.number("nnodes", 0) or command.number("num_nodes", 1)))
    whole = command.number("train_batch_size", 4) * processes * command.number("gradient_accumulation_steps", 1)
    command.settings["train.batch"] = whole
    if "scale_lr" in command.flags:
        command.settings["train.lr"] = command.number("learning_rate", 0) * whole
        command.notes.append(f"--scale_lr: the learning rate is multiplied by the global batch of {whole}")
    if "max_train_steps" not in command.flags:
        command.notes.append("without --max_train_steps the script counts epochs; set train.steps")
    if not command.settings.get("train.text_encoder"):
        command.settings.pop("train.text_encoder_lr", None)
    elif "sdxl" in command.script:
        command.settings.setdefault("train.text_encoder_lr", 5e-6)


def _schedule(command: _Command) -> None:
    """Set learning-rate schedule and warm-up. The script's plain `constant` has no warm-up, whatever the flag says."""
    name, warmup = command.get("lr_scheduler"), _plain(command.get("lr_warmup_steps"))
    nearest = {"cosine_with_restarts": "cosine", "polynomial": "linear", "piecewise_constant": "constant",
               "constant_with_warmup": "constant"}
    command.settings["train.schedule"] = nearest.get(name, name)
    if name in nearest and name != "constant_with_warmup":
        command.drop("lr_scheduler", f"not available; {command.settings['train.schedule']} is the nearest")
    steps = command.settings.get("train.steps", recipes.load().train.steps)
    if name != "constant" and isinstance(warmup, int) and isinstance(steps, int):
        command.settings["train.warmup_steps"] = max(0, min(warmup, steps - 1))
        if warmup >= steps:
            command.notes.append(f"a warm-up of {warmup} steps never ends in {steps}; it is cut to {max(0, steps - 1)}")


def _precision(command: _Command) -> None:
    name = command.get("mixed_precision")
    command.settings["train.precision"] = {"no": "fp32"}.get(name, name)
    if name == "fp16":
        command.notes.append("fp16 scales the loss; on a GPU that has it, train.precision=bf16 needs no scaling")


def _prior(command: _Command) -> None:
    """Set the loss weights of prior preservation and Min-SNR."""
    if "with_prior_preservation" not in command.flags:
        command.settings["prior.weight"] = 0
        command.settings.pop("prior.images", None)
    if "snr_gamma" in command.flags:
        command.settings["objective.weighting"] = "min_snr"
        if "with_prior_preservation" in command.flags:
            command.notes.append("the script mixes up both roles with --snr_gamma and prior preservation "
                                 "(diffusers issue 5791); dbtrain weighs each sample, so results differ for the better")


def _zero(command: _Command) -> None:
    """Take over DeepSpeed's flags of `accelerate launch`."""
    if "use_deepspeed" in command.flags:
        command.settings.setdefault("engine.zero.stage", 2)
    for flag, key in (("offload_optimizer_device", "optimizer"), ("offload_param_device", "parameters")):
        if command.get(flag) in ("cpu", "nvme"):
            command.settings[f"engine.zero.offload_{key}"] = True
        if command.get(flag) == "nvme":
            command.notes.append(f"--{flag} nvme becomes host memory")


def _track(command: _Command) -> None:
    trackers = re.split(r"[\s,]+", command.get("report_to"))
    for name in ("wandb", "trackio"):
        if name in trackers or "all" in trackers:
            command.settings[f"track.{name}"] = "dreambooth"
    for name in set(trackers) - {"", "all", "none", "tensorboard", "wandb", "trackio"}:
        command.drop("report_to", f"no {name}; TensorBoard, wandb and trackio are available")


def _captions(command: _Command) -> dict[str, Any]:
    """The manifest's row; captions and prompts of the recipe become templates as well."""
    instance, prior = command.get("instance_prompt"), command.get("class_prompt")
    identifier, noun = _split_prompt(instance, prior)
    if noun is not None and identifier and not prior:
        command.notes.append(
            f"guessed from {instance!r}: the identifier is {identifier!r}, the class {noun!r}; correct both in the "
            "manifest, and `data.caption` in the recipe, where that is wrong"
        )
    if noun is None:
        noun = "object"
        command.notes.append(f"no class noun found in {instance!r}; correct `class` in the manifest: it matters most")
    caption = _template(instance, identifier, noun)
    if "{identifier}" in caption:
        command.settings["data.caption"] = caption
    else:
        command.notes.append(f"no identifier found in {instance!r}; dbtrain chooses a rare token and its own caption")
    if "with_prior_preservation" in command.flags and prior:
        command.settings["data.class_caption"] = _template(prior, None, noun)
    if prompt := command.get("validation_prompt"):
        command.settings["sample.prompts"] = [_template(prompt, identifier, noun, subject=True)]
    else:
        command.settings.pop("sample.images", None)
    folder = command.get("instance_data_dir") or "photos"
    if "instance_data_dir" not in command.flags:
        command.notes.append("no --instance_data_dir; put the photos' folder into the manifest")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(folder).name).strip("-_")[:64] or "subject"
    row = {"subject": name, "class": noun, "images": folder, "identifier": identifier}
    return {key: value for key, value in row.items() if value is not None}


def _split_prompt(instance: str, prior: str) -> tuple[str | None, str | None]:
    """(identifier, class noun) of `a photo of sks dog` and, where given, `a photo of dog`; None where not found."""
    subject = _core(instance)
    noun = _core(prior) or None
    if noun and (found := re.match(rf"(.+?)\s+{re.escape(noun)}$", subject, re.I)):
        return found[1], noun
    words = subject.split()
    if noun is None and len(words) > 1:
        place = _rare_word(words)
        return words[place], " ".join(words[place + 1 :] or words[:place])
    # "a photo of sks" beside "a photo of a dog": the noun stands in the class prompt only.
    return (words[0] if len(words) == 1 and subject != noun else None), noun


def _rare_word(words: list[str]) -> int:
    """Place of the identifier among a prompt's words: of the first that is no word, or else of the first."""
    return next((place for place, word in enumerate(words) if not _is_word(word)), 0)


def _is_word(text: str) -> bool:
    """Whether letters can be spoken as a word: at least a vowel, and no long run of consonants or digit."""
    plain = text.lower().strip(".,;:!?")
    if not plain.isalpha():
        return False
    vowels = len(re.findall("[aeiouy]", plain))
    return bool(vowels) and not re.search(r"[bcdfghjklmnpqrstvwxz]{4}", plain) and plain not in IDENTIFIERS


IDENTIFIERS = frozenset("sks ohwx zwx olis gabi tok hta ktn shs srx bnha".split())
"""Identifiers that tutorials give, some of which can be spoken."""


def _core(prompt: str) -> str:
    """What a prompt shows: without `a photo of a` before it and the scene behind it."""
    return _TAIL.sub("", _ARTICLE.sub("", _PICTURE.sub("", prompt.strip(), count=1), count=1)).strip()


def _template(prompt: str, identifier: str | None, noun: str, subject: bool = False) -> str:
    """The prompt with identifier and class noun replaced by placeholders."""
    text = prompt.replace("{", "(").replace("}", ")")
    if identifier and subject:
        text = re.sub(rf"\b{re.escape(identifier)}\s+{re.escape(noun)}\b", "{subject}", text, flags=re.I)
    if identifier:
        text = re.sub(rf"(?<!\w){re.escape(identifier)}(?!\w)", "{identifier}", text)
    return re.sub(rf"(?<![\w{{]){re.escape(noun)}(?![\w}}])", "{class}", text, flags=re.I)


def _nest(settings: dict[str, Any]) -> dict[str, Any]:
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
