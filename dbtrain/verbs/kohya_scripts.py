"""kohya's trainers of LoRAs: their command lines and TOML files, as a recipe and a manifest.

Read in sd-scripts of February 2026: `train_network.py`, `sdxl_`, `flux_` and `sd3_train_network.py`. A settings file
(`--config_file`) holds flags, in sections of any name; a dataset file (`--dataset_config`) holds folders of photos.
"""

import math
import re
import tomllib
from pathlib import Path, PurePath
from typing import Any

from dbtrain.errors import ConfigError, DataError, named
from dbtrain.families import FAMILIES
from dbtrain.verbs import command_line
from dbtrain.verbs.command_line import Command, Migration, by_flag, migration, plain

UNET = ("attn*.to_q", "attn*.to_k", "attn*.to_v", "attn*.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
JOINT = ("attn*.to_q", "attn*.to_k", "attn*.to_v", "attn*.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
         "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
         "ff_context.net.2", "norm1.linear", "norm1_context.linear")  # fmt: skip
SCRIPTS = {
    "train_network.py": ("sd", UNET),
    "sdxl_train_network.py": ("sdxl", UNET),
    "sd3_train_network.py": ("sd3", JOINT),
    "flux_train_network.py": ("flux", (*JOINT, "proj_mlp", "norm.linear", "single_transformer_blocks.*.proj_out")),
}
"""The scripts' families, and the layers that their adapters have."""
TEXT_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
MODULES = {"networks.lora": None, "networks.lora_flux": "flux_train_network.py",
           "networks.lora_sd3": "sd3_train_network.py"}  # fmt: skip
"""Kinds of adapter that are plain LoRA, and the script that alone takes them."""

DEFAULTS = {"learning_rate": "2e-6", "network_dim": "4", "network_alpha": "1", "train_batch_size": "1",
            "gradient_accumulation_steps": "1", "max_train_steps": "1600", "mixed_precision": "no",
            "lr_scheduler": "constant", "lr_warmup_steps": "0", "prior_loss_weight": "1.0"}  # fmt: skip
"""Defaults of the scripts that decide a result."""

KEYS = {
    "pretrained_model_name_or_path": "model.path", "network_dim": "lora.rank", "network_alpha": "lora.alpha",
    "network_weights": "lora.init", "max_train_steps": "train.steps", "train_batch_size": "train.micro_batch",
    "noise_offset": "objective.noise_offset", "caption_dropout_rate": "data.caption_dropout", "seed": "seed",
    "min_snr_gamma": "objective.snr_gamma", "save_every_n_steps": "checkpoint.every_steps",
    "sample_every_n_steps": "sample.every_steps",
}  # fmt: skip
SWITCHES: dict[str, tuple[str, Any]] = {
    "gradient_checkpointing": ("train.gradient_checkpointing", True), "flip_aug": ("data.flip", True),
    "random_crop": ("data.crop", "random"), "xformers": ("model.attention", "xformers"),
    "sdpa": ("model.attention", "sdpa"), "zero_terminal_snr": ("model.zero_terminal_snr", True),
    "v_parameterization": ("model.parameterization", "v_prediction"), "masked_loss": ("data.mask_floor", 0),
    "enable_bucket": ("data.buckets", True),
    "debiased_estimation_loss": ("objective.weighting", "debiased"), "alpha_mask": ("data.mask_floor", 0),
}  # fmt: skip
"""Flags without a value, and the setting they stand for."""

DROPPED = by_flag({
    "output_dir logging_dir log_prefix": "everything lies in the folder that --out names",
    "output_name save_model_as save_precision": "adapters are .safetensors in fp32, named by the subject's id",
    "save_every_n_epochs max_train_epochs sample_every_n_epochs": "progress is counted in steps",
    "sample_prompts": "put the prompts into sample.prompts",
    "sample_sampler": "samples are drawn with the model's own scheduler",
    "clip_l clip_g t5xxl ae vae":
        "the base's own parts are used: give a folder of diffusers, or model.single_file_layout with a single file",
    "clip_skip": "captions are encoded as the family's pipeline does in sampling",
    "max_token_length t5xxl_max_token_length apply_t5_attn_mask apply_lg_attn_mask":
        "captions have the length that the pipeline samples with",
    "shuffle_caption keep_tokens keep_tokens_separator caption_tag_dropout_rate caption_prefix caption_suffix "
    "weighted_captions caption_separator enable_wildcard in_json":
        "captions are used as they are",
    "min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale":
        "shapes have about data.resolution^2 pixels, from 1:2 to 2:1",
    "color_aug face_crop_aug_range": "no such change of a photo",
    "resume": "running the same dbtrain command again resumes",
    "save_state": "checkpoints are always whole",
    "reg_data_dir": "class images are drawn by dbtrain; for these, `dbtrain prior import` and prior.sampler=imported",
    "network_dropout scale_weight_norms dim_from_weights base_weights": "adapters have lora.rank, lora.alpha, no more",
    "loss_type multires_noise_iterations multires_noise_discount ip_noise_gamma adaptive_noise_scale min_timestep "
    "max_timestep mode_scale model_prediction_type":
        "the objective is the squared error of what the model predicts, over all timesteps",
    "scale_v_pred_loss_like_noise_pred v_pred_like_loss": "see objective.weighting",
    "blocks_to_swap lowram highvram cpu_offload_checkpointing split_mode":
        "needed in no recipe; see train.gradient_checkpointing and model.dtype",
    "fp8_base fp8_base_unet": "see model.quantize",
    "full_bf16 full_fp16": "masters are fp32",
    "mem_eff_attn": "use model.attention",
    "huggingface_repo_id huggingface_token": "dbtrain push has --to and takes HF_TOKEN",
    "wandb_api_key wandb_run_name training_comment": "run `wandb login`; runs are named by their folder",
    "torch_compile": "use engine.capture=compile",
    "lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_type": "see train.schedule",
    "conditioning_data_dir": "masks are files beside photos, or the column mask",
    "guidance_scale": "training has the guidance 1 that FLUX.1's authors advise; the script's default is 3.5",
})  # fmt: skip
"""Flags without a setting of the same meaning, with the reason."""

USED = frozenset("""
    network_module network_args network_train_unet_only network_train_text_encoder_only learning_rate unet_lr
    text_encoder_lr text_encoder_lr1 text_encoder_lr2 resolution train_data_dir dataset_config config_file
    gradient_accumulation_steps mixed_precision lr_scheduler lr_warmup_steps optimizer_type optimizer_args use_8bit_adam
    use_lion_optimizer max_grad_norm prior_loss_weight log_with log_tracker_name v2 caption_extension cache_latents
    cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk vae_batch_size
    max_data_loader_n_workers persistent_data_loader_workers timestep_sampling sigmoid_scale discrete_flow_shift
    training_shift weighting_scheme logit_mean logit_std model_type no_half_vae num_cpu_threads_per_process
    num_processes num_machines num_gpus nproc_per_node nnodes num_nodes multi_gpu dynamo_backend gpu_ids
    main_process_port text_encoder_batch_size skip_cache_check cache_info no_metadata
""".split())
"""Flags that several settings follow from, or that say only how something was started or kept."""


def is_toml(text: str) -> bool:
    """Whether a text is a settings file and no command line."""
    try:
        return any(key in flags_in(tomllib.loads(text)) for key in ("pretrained_model_name_or_path", "network_module"))
    except tomllib.TOMLDecodeError:
        return False


def flags_in(settings: dict[str, Any]) -> dict[str, str]:
    """The flags that a settings file stands for, its sections left out; switches that are off are left out too."""
    flags: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flags |= flags_in(value)
        elif value is True:
            flags[name] = ""
        elif value is not False and not (isinstance(value, list) and value and isinstance(value[0], dict)):
            flags[name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flags


def migrate_toml(text: str) -> Migration:
    """Recipe and manifest of a settings file, which does not name its script."""
    settings = tomllib.loads(text)
    flags = flags_in(settings)
    script = MODULES.get(flags.get("network_module", ""))
    if script is None:
        side = max(_sides(flags.get("resolution", "512")), default=512)
        is_xl = side >= 1024 or "xl" in PurePath(flags.get("pretrained_model_name_or_path", "")).name.lower()
        script = "sdxl_train_network.py" if is_xl else "train_network.py"
    return migrate_words(script, flags, settings, f"read as a file for {script}")


def migrate_words(
    script: str, flags: dict[str, str], settings: dict[str, Any] | None = None, note: str | None = None
) -> Migration:
    """Recipe and manifest of a script's flags. settings: a file that may hold datasets too."""
    if place := flags.get("config_file"):
        settings = _read(place if place.endswith(".toml") else f"{place}.toml", "--config_file")
        flags = {**flags_in(settings), **flags}
    if place := flags.get("dataset_config"):
        settings = _read(place, "--dataset_config") if Path(place).is_file() else settings
    command = Command(script, flags, DEFAULTS)
    if note:
        command.notes.append(note)
    family, targets = SCRIPTS[script]
    _refuse(command)
    if family not in FAMILIES:
        raise ConfigError(f"migrate: {script}: dbtrain has no family {family}")
    command.settings |= {"train.method": "lora", "data.crop": "center", "lora.targets": targets}
    _table(command)
    _rates(command)
    subsets = _subsets(command, settings or {})
    _resolution(command)
    rows = _rows(command, subsets)
    _batch(command, subsets)
    command_line.set_schedule(command)
    command_line.set_precision(command)
    command_line.set_min_snr(command, "min_snr_gamma")
    _noise(command, family)
    _prior(command, subsets)
    command_line.set_trackers(command, "log_with")
    command_line.suit_family(command, FAMILIES[family])
    return migration(command, rows, "kohya's")


def _read(place: str, flag: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(place).expanduser().read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"migrate: {flag} {named(place)}: cannot be read as TOML ({error}); give its text") from error


def _refuse(command: Command) -> None:
    """Raise ConfigError for what no recipe can say."""
    script, module = command.program, command.get("network_module") or "networks.lora"
    if "pretrained_model_name_or_path" not in command.flags:
        raise ConfigError(f"migrate: {script} without --pretrained_model_name_or_path, want the base model")
    if module not in MODULES:
        raise ConfigError(f"migrate: {script}: --network_module {module}: plain LoRA only, want networks.lora")
    if "network_train_text_encoder_only" in command.flags:
        raise ConfigError(f"migrate: {script}: --network_train_text_encoder_only: the denoiser is always trained")
    if command.get("model_type") not in ("", "flux"):
        raise ConfigError(f"migrate: {script}: --model_type {command.get('model_type')}: this script's FLUX.1 only")


def _table(command: Command) -> None:
    """Take over every flag that the tables know."""
    command.take_all(SWITCHES, KEYS, USED, DROPPED)
    for argument in command.get("network_args").split():
        name, _, ratio = argument.partition("=")
        if name == "loraplus_lr_ratio":
            command.settings["lora.up_ratio"] = plain(ratio)
            continue
        command.drop("network_args", f"{argument}: adapters have no such option; see lora.targets and lora.rank")
    if command.get("caption_extension") not in ("", ".txt", ".caption"):
        command.drop("caption_extension", "captions are read from .txt and .caption beside a photo")
    if "v2" in command.flags:
        command.notes.append("--v2: the base's own files say that it is Stable Diffusion 2")


def _rates(command: Command) -> None:
    """Set the rates, AdamW's other numbers, and whether the text encoder trains: in kohya's scripts it does by
    default."""
    flags, settings = command.flags, command.settings
    rate = command.get("unet_lr") or command.get("learning_rate")
    text = (command.get("text_encoder_lr") or command.get("text_encoder_lr1")).split()
    flags["rate"] = rate
    settings["train.lr"] = plain(rate)
    cached = "cache_text_encoder_outputs" in flags or "cache_text_encoder_outputs_to_disk" in flags
    if not ("network_train_unet_only" in flags or cached or (text and plain(text[0]) == 0)):
        settings["train.text_encoder"] = True
        settings["lora.text_targets"] = TEXT_LAYERS
        if (text_rate := text[0] if text else command.get("learning_rate")) != rate:
            settings["train.text_encoder_lr"] = plain(text_rate)
        if len({*text, *command.get("text_encoder_lr2").split()}) > 1:
            command.notes.append(f"text encoders have one rate here, {text_rate}")
    for old, new in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if old in flags:
            flags["optimizer_type"] = new
    command_line.set_optimizer(command, "optimizer_type", {"rate": "train.lr"})
    if command_line.ADAPTIVE.search(command.get("optimizer_type")):
        settings.pop("train.text_encoder_lr", None)
    if command.get("optimizer_type").lower().endswith("8bit"):
        command_line.set_eight_bits(command)
    for name, value in re.findall(r"(\w+)\s*=\s*(\S+)", command.get("optimizer_args")):
        keys = {"weight_decay": ("train.weight_decay",), "eps": ("train.eps",), "betas": ("train.beta1", "train.beta2")}
        if name not in keys:
            command.drop("optimizer_args", f"{name}: not one of AdamW's")
        settings |= dict(zip(keys.get(name, ()), map(plain, value.strip("()").split(","))))
    if clip := command.get("max_grad_norm"):
        settings["train.clip_norm"] = plain(clip) or None


def _subsets(command: Command, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The folders of photos, each with what its dataset and the general section say."""
    if command.get("dataset_config") and not settings.get("datasets"):
        command.drop("dataset_config", "the file is not here; give its folders in the manifest")
    subsets = []
    for dataset in settings.get("datasets", []):
        around = {**settings.get("general", {}), **{k: v for k, v in dataset.items() if k != "subsets"}}
        subsets += [{**around, **subset} for subset in dataset.get("subsets", [])]
    first = subsets[0] if subsets else {}
    for name, flag in (("resolution", "resolution"), ("batch_size", "train_batch_size")):
        value = first.get(name)
        if value is not None:
            command.flags[flag] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if len({str(subset.get(name)) for subset in subsets}) > 1:
            command.notes.append(f"datasets differ in {name}; the first one's {value} is taken for all")
    if "batch_size" in first:
        command.settings["train.micro_batch"] = first["batch_size"]
    if first.get("flip_aug"):
        command.settings["data.flip"] = True
    return subsets


def _sides(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", text)]


def _resolution(command: Command) -> None:
    """Set the side of the square: kohya's sides may differ, and its area is kept."""
    sides = _sides(command.get("resolution"))
    if not sides:
        command.notes.append("no --resolution; set data.resolution")
        return
    width, height = sides[0], sides[-1]
    command.settings["data.resolution"] = side = round(math.sqrt(width * height) / 16) * 16
    if width != height:
        command.notes.append(f"{width} x {height} becomes a square of {side}")


def _rows(command: Command, subsets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifest's rows: of a dataset file, or of folders such as `10_zorbo gadget`."""
    command.settings["data.caption"] = "{identifier} {class}"
    photos = [subset for subset in subsets if not subset.get("is_reg") and subset.get("image_dir")]
    rows: list[dict[str, Any]] = []
    for subset in photos:
        word, _, noun = str(subset.get("class_tokens", "")).strip().partition(" ")
        if not noun:
            command.notes.append(f"{subset['image_dir']}: class_tokens {word!r} name no class; correct the manifest")
        same = next((row for row in rows if (row.get("identifier"), row["class"]) == (word, noun or "object")), None)
        if same:
            same["images"].append(str(subset["image_dir"]))
            continue
        row = {"subject": _id(word, rows), "class": noun or "object", "images": [str(subset["image_dir"])]}
        rows.append({**row, **({"identifier": word} if word else {})})
    return rows or _rows_of_folder(command)


def _rows_of_folder(command: Command) -> list[dict[str, Any]]:
    from dbtrain.subjects.foreign import from_kohya

    folder = command.get("train_data_dir")
    if folder and Path(folder).expanduser().is_dir():
        try:
            imported = from_kohya(Path(folder).expanduser())
        except DataError as error:
            raise ConfigError(f"migrate: --train_data_dir: {error}") from error
        command.notes += imported.said
        return imported.rows
    place = folder or "photos"
    command.notes.append(f"{place} is not here: `dbtrain import kohya {place}` makes the manifest from its folders, "
                         "such as `10_zorbo gadget`")  # fmt: skip
    return [{"subject": "subject", "class": "object", "images": place}]


def _id(word: str, rows: list[dict[str, Any]]) -> str:
    plain_word = re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-_")[:60] or "subject"
    taken = {row["subject"] for row in rows}
    numbered = (f"{plain_word}-{number}" for number in range(2, len(rows) + 3))
    return plain_word if plain_word not in taken else next(name for name in numbered if name not in taken)


def _batch(command: Command, subsets: list[dict[str, Any]]) -> None:
    """Set the global batch; epochs stay uncounted, as they depend on the photos."""
    whole = command.number("train_batch_size", 1) * command_line.processes(command)
    command.settings["train.batch"] = whole * command.number("gradient_accumulation_steps", 1)
    command.settings.setdefault("train.micro_batch", command.number("train_batch_size", 1))
    if "max_train_epochs" in command.flags:
        command.settings.pop("train.steps", None)
        repeats = {subset.get("num_repeats", 1) for subset in subsets} or {"the folders' numbers"}
        command.notes.append("--max_train_epochs decides over --max_train_steps: set train.steps to epochs x photos x "
                             f"repeats ({', '.join(map(str, sorted(repeats, key=str)))}) / batch")  # fmt: skip


def _noise(command: Command, family: str) -> None:
    """Set how noise levels are drawn for a flow model."""
    settings, mean = command.settings, plain(command.get("logit_mean") or "0")
    if family not in ("flux", "sd3"):
        return
    if family == "flux" and plain(command.get("guidance_scale")) != 1:
        command.notes.append(f"the script trains with --guidance_scale {command.get('guidance_scale') or 3.5}, dbtrain "
                             "with 1, as the model's authors advise")  # fmt: skip
    way = command.get("timestep_sampling") or "sigma"
    scheme = command.get("weighting_scheme") or "uniform"
    if family == "sd3" or way == "sigma":
        settings["objective.timesteps"] = "logit_normal" if scheme == "logit_normal" else "uniform"
        if scheme in ("sigma_sqrt", "cosmap", "mode"):
            command.drop("weighting_scheme", "no such weighting; noise levels are drawn uniformly")
        if scheme == "logit_normal":
            # kohya's FLUX script counts from noise to clean here, its SD3 script from clean to noise.
            settings["objective.logit_mean"] = -mean if family == "flux" and mean else mean
            settings["objective.logit_std"] = plain(command.get("logit_std") or "1.0")
    else:
        settings["objective.timesteps"] = "uniform" if way == "uniform" else "logit_normal"
        if way != "uniform":
            settings["objective.logit_std"] = plain(command.get("sigmoid_scale") or "1.0")
    shifts = {"sigma": command.get("discrete_flow_shift") or "3.0", "flux_shift": "auto",
              "shift": command.get("discrete_flow_shift") or "3.0"}  # fmt: skip
    shift = command.get("training_shift") or "1.0" if family == "sd3" else shifts.get(way, "1.0")
    settings["objective.shift"] = plain(shift)


def _prior(command: Command, subsets: list[dict[str, Any]]) -> None:
    """Set the weight of the priors. kohya mixes photos and class images in a batch."""
    if "reg_data_dir" not in command.flags and not any(subset.get("is_reg") for subset in subsets):
        command.settings["prior.weight"] = 0
        return
    command.settings["prior.weight"] = plain(command.get("prior_loss_weight"))
    command.notes.append("the script's batch holds photos and class images, about half and half; train.batch counts "
                         "photos, and as many class images come on top")  # fmt: skip
    if any(subset.get("is_reg") for subset in subsets):
        command.notes.append(f"regularization images: {DROPPED['reg_data_dir']}")
