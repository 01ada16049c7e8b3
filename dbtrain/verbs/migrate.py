"""From another trainer's command line to a recipe and a manifest, with a list of what was left out and why.

Understood are diffusers' DreamBooth scripts (`diffusers_scripts.py`) and kohya's trainers of LoRAs
(`kohya_scripts.py`), started by python, accelerate, torchrun or deepspeed. Defaults of the scripts that differ from
dbtrain's are written out, so that the recipe trains what the command trained.
"""

import re
from pathlib import Path, PurePath
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.verbs import command_line, kohya_scripts
from dbtrain.verbs.command_line import Command, Migration, migration, plain
from dbtrain.verbs.diffusers_scripts import (
    CASCADE,
    DROPPED,
    EDM,
    GUIDED,
    KEYS,
    LENGTH,
    PAIRS,
    REFUSED,
    SCRIPTS,
    SWITCHES,
    USED,
    Script,
)
from dbtrain.verbs.prompt_parts import split_prompt, template
from dbtrain.verbs.shell_words import flags_of, shell_words


def migrate(text: str) -> Migration:
    """Recipe and manifest of a command line, or of a settings file of kohya's trainers.

    Raises ConfigError for another script, for a command without a base model, and for values no run could have.
    """
    if kohya_scripts.is_toml(text):
        return kohya_scripts.migrate_toml(text)
    words = shell_words(text)
    position = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    known = [*SCRIPTS, *kohya_scripts.SCRIPTS]
    if position is None:
        raise ConfigError("migrate: no script in the command line, want one of " + ", ".join(known))
    script = PurePath(words[position].replace("\\", "/")).name
    if script in REFUSED:
        raise ConfigError(f"migrate: {script} cannot be migrated: {REFUSED[script]}")
    if script not in known:
        raise ConfigError(f"migrate: {script}: only these are understood: {', '.join(known)}")
    launcher, own = flags_of(words[:position]), flags_of(words[position + 1 :])
    if script in kohya_scripts.SCRIPTS:
        return kohya_scripts.migrate_words(script, {**launcher, **own})
    if "pretrained_model_name_or_path" not in own:
        raise ConfigError(f"migrate: {script} without --pretrained_model_name_or_path, want the base model")
    command = Command(script, {**launcher, **own}, SCRIPTS[script].defaults)
    if "accelerate" in words[:position] and "num_processes" not in launcher:
        command.notes.append("accelerate without --num_processes: taken as 1 process; correct train.batch if more")
    return _migrate_diffusers(command)


def _migrate_diffusers(command: Command) -> Migration:
    """Recipe and manifest of a diffusers command."""
    script = SCRIPTS[command.program]
    row = _family(command, script)
    _table(command, script)
    command_line.set_optimizer(
        command, "optimizer", {"learning_rate": "train.lr", "text_encoder_lr": "train.text_encoder_lr"}
    )
    if "use_8bit_adam" in command.flags and command.get("optimizer").lower() in ("", "adamw"):
        command_line.set_eight_bits(command)
    _batch(command)
    command_line.set_schedule(command)
    command_line.set_precision(command)
    _noise(command, script)
    _prior(command)
    _zero(command)
    command_line.set_trackers(command, "report_to")
    command_line.suit_family(command, row)
    _say_differences(command, script)
    return migration(command, [_captions(command)], "diffusers'")


def _family(command: Command, script: Script) -> Any:
    """The row that trains what a script trains. Raises ConfigError where there is none."""
    flags, base = command.flags, command.get("pretrained_model_name_or_path")
    pipeline = script.pipeline
    if "class_labels_conditioning" in flags:
        pipeline = CASCADE[1]
    elif "text_encoder_use_attention_mask" in flags or "DeepFloyd" in base:
        pipeline = CASCADE[0]
    if "cond_image_column" in flags:
        raise ConfigError(f"migrate: {command.program} with --cond_image_column cannot be migrated: {PAIRS}")
    if "playground-v2.5" in base:
        command.notes.append(EDM)
        return FAMILIES["playground"]
    if "do_edm_style_training" in flags:
        raise ConfigError(
            f"migrate: {command.program}: trains {base} in EDM's form, and its own scheduler is of another; leave "
            "--do_edm_style_training out, or name Playground v2.5"
        )
    if plain(command.get("train_transformer_frac")) == 0:
        raise ConfigError(f"migrate: {command.program}: trains token embeddings alone, and dbtrain trains weights")
    row = next((row for row in FAMILIES.values() if row.pipeline == pipeline), None)
    if row is None:
        raise ConfigError(
            f"migrate: {command.program}: dbtrain has no family for {pipeline.removesuffix('Pipeline')} models; "
            f"it has {', '.join(FAMILIES)}"
        )
    return row


def _table(command: Command, script: Script) -> None:
    """Take over every flag that the tables know."""
    command.settings["train.method"] = script.method
    command.take_all(SWITCHES, KEYS, USED, DROPPED)
    if not command.settings.get("train.text_encoder"):
        command.settings.pop("train.text_encoder_lr", None)
    command.settings["data.crop"] = "center" if "center_crop" in command.flags else "random"
    if "center_crop" not in command.flags:
        command.notes.append(
            "without --center_crop the script crops at random, so latents are not cached; "
            "for (nearly) square photos data.crop=center gives the same and is faster"
        )
    if script.targets:
        layers = [name.strip() for name in command.get("lora_layers").split(",") if name.strip()]
        command.settings["lora.targets"] = tuple(layers or script.targets)
    if (blocks := command.get("lora_blocks")) and script.targets:
        targets = command.settings["lora.targets"]
        command.settings["lora.targets"] = tuple(
            f"transformer_blocks.{block.strip()}.{name}" for block in blocks.split(",") for name in targets
        )


def _batch(command: Command) -> None:
    """Set global batch and learning rate from the number of processes and the accumulation."""
    processes = command_line.processes(command)
    whole = command.number("train_batch_size", 4) * processes * command.number("gradient_accumulation_steps", 1)
    command.settings["train.batch"] = whole
    if "scale_lr" in command.flags:
        command.settings["train.lr"] = command.number("learning_rate", 0) * whole
        command.notes.append(f"--scale_lr: the learning rate is multiplied by the global batch of {whole}")
    if "max_train_steps" not in command.flags:
        command.notes.append("without --max_train_steps the script counts epochs; set train.steps")


def _noise(command: Command, script: Script) -> None:
    """Set how noise levels are drawn for a flow model."""
    if script.flow is None:
        command_line.set_min_snr(command, "snr_gamma")
        return
    scheme = command.get("weighting_scheme") or script.flow
    command.settings["objective.timesteps"] = "logit_normal" if scheme == "logit_normal" else "uniform"
    if scheme in ("sigma_sqrt", "cosmap", "mode"):
        command.drop("weighting_scheme", "no such weighting; noise levels are drawn uniformly")
    mean = plain(command.get("logit_mean") or "0")
    if scheme == "logit_normal" and mean != 0:
        turned = isinstance(mean, int | float) and not script.direct
        command.settings["objective.logit_mean"] = -mean if turned else mean
    if scheme == "logit_normal" and mean != 0 and not script.direct:
        command.notes.append("--logit_mean counts from noise to clean in the script, and from clean to noise in "
                             "dbtrain: its sign is turned")  # fmt: skip
    if scheme != "logit_normal":
        command.settings.pop("objective.logit_std", None)
    if script.dynamic:
        command.settings["objective.shift"] = 1
        command.notes.append("the script leaves out the shift of noise levels by the size of an image that the model "
                             "was trained with; objective.shift=auto has it")  # fmt: skip


def _prior(command: Command) -> None:
    """Set the loss weights of prior preservation."""
    if "with_prior_preservation" not in command.flags:
        command.settings["prior.weight"] = 0
        command.settings.pop("prior.images", None)
    elif "snr_gamma" in command.flags:
        command.notes.append(
            "the script mixes up both roles with --snr_gamma and prior preservation "
            "(diffusers issue 5791); dbtrain weighs each sample, so results differ for the better"
        )


def _zero(command: Command) -> None:
    """Take over DeepSpeed's flags of `accelerate launch`."""
    if "use_deepspeed" in command.flags:
        command.settings.setdefault("engine.zero.stage", 2)
    for flag, key in (("offload_optimizer_device", "optimizer"), ("offload_param_device", "parameters")):
        if command.get(flag) in ("cpu", "nvme"):
            command.settings[f"engine.zero.offload_{key}"] = True
        if command.get(flag) == "nvme":
            command.notes.append(f"--{flag} nvme becomes host memory")


def _say_differences(command: Command, script: Script) -> None:
    """Note where the script trains otherwise than dbtrain does, whatever its flags, and what base it was given."""
    from dbtrain.models.recognition import distilled

    for note in script.notes:
        if note == GUIDED and plain(command.get("guidance_scale")) == 1:
            continue
        if note == LENGTH and "max_sequence_length" in command.flags:
            continue
        command.notes.append(note.format(**{**script.defaults, **command.flags}))
    base = command.get("pretrained_model_name_or_path")
    if why := distilled(base):
        command.settings["model.distilled"] = True
        command.notes.append(f"{base} {why}; train on the base that it was made of, and sample with this one")


def _captions(command: Command) -> dict[str, Any]:
    """The manifest's row; captions and prompts of the recipe become templates as well."""
    instance, prior = command.get("instance_prompt"), command.get("class_prompt")
    identifier, noun = split_prompt(instance, prior)
    if noun is not None and identifier and not prior:
        command.notes.append(
            f"guessed from {instance!r}: the identifier is {identifier!r}, the class {noun!r}; correct both in the "
            "manifest, and `data.caption` in the recipe, where that is wrong"
        )
    if noun is None:
        noun = "object"
        command.notes.append(f"no class noun found in {instance!r}; correct `class` in the manifest: it matters most")
    caption = template(instance, identifier, noun)
    if "{identifier}" in caption:
        command.settings["data.caption"] = caption
    else:
        command.notes.append(f"no identifier found in {instance!r}; dbtrain chooses a rare token and its own caption")
    if "with_prior_preservation" in command.flags and prior:
        command.settings["data.class_caption"] = template(prior, None, noun)
    if prompt := command.get("validation_prompt"):
        command.settings["sample.prompts"] = [template(prompt, identifier, noun, subject=True)]
    else:
        command.settings.pop("sample.images", None)
    folder = _folder(command)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(folder).name).strip("-_")[:64] or "subject"
    row = {"subject": name, "class": noun, "images": folder, "identifier": identifier}
    return {key: value for key, value in row.items() if value is not None}


def _folder(command: Command) -> str:
    """The folder of the photos: the script's, or a data set's, which may be a folder too."""
    dataset, folder = command.get("dataset_name"), command.get("instance_data_dir")
    if not dataset or folder:
        if dataset:
            command.drop("dataset_name", "--instance_data_dir names the photos")
        elif not folder:
            command.notes.append("no --instance_data_dir; put the photos' folder into the manifest")
        return folder or "photos"
    if command.get("image_column") not in ("", "image", "file_name"):
        command.drop("image_column", "photos are the files of the folder")
    column = command.get("caption_column")
    if column in ("text", "caption", "prompt"):
        command.notes.append(f"captions come from the column {column} of the folder's metadata.jsonl, where it is")
    elif column:
        command.drop("caption_column", "captions are read from the column text, caption or prompt of metadata.jsonl")
    if re.match(r"\.{0,2}[/~]|\.\.?$|[A-Za-z]:", dataset) or Path(dataset).is_dir():
        return dataset
    command.drop("dataset_name", f"dbtrain reads folders of photos; download the data set into {dataset}/, with its "
                                 "captions in metadata.jsonl, or name another folder in the manifest")  # fmt: skip
    return dataset
