"""diffusers' published DreamBooth commands become the trainings that their scripts would have done.

The commands stand in `diffusers_commands.txt`. What they mean is read here in another way than in the code: by
argparse, and by facts about the scripts that are written down below.
"""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.settings import recipes
from dbtrain.verbs.diffusers_scripts import DROPPED, KEYS, REFUSED, SCRIPTS, SWITCHES, USED
from dbtrain.verbs.migrate import migrate

TEXT = (Path(__file__).parent / "diffusers_commands.txt").read_text("utf-8")
COMMANDS = dict(re.findall(r"### (\S+)\n(.*?)(?=\n### |\Z)", TEXT, re.DOTALL))
NEVER = {
    "examples/dreambooth/README_hidream.md:70": "four text encoders",
    "examples/dreambooth/README_flux.md:315": "pairs of pictures",
    "examples/dreambooth/README_flux2.md:383": "pairs of pictures",
    "examples/advanced_diffusion_training/README_flux.md:256": "token embeddings alone",
}
"""Commands that no family can run, and why."""
FLOW = {
    # Distribution of noise levels, shift: the official scripts leave out a dynamic shift, and have a static one.
    "sd3": ("logit_normal", "auto"), "flux": ("uniform", 1), "flux2": ("uniform", 1), "flux2_klein": ("uniform", 1),
    "qwen_image": ("uniform", 1), "krea2": ("uniform", 1), "z_image": ("uniform", "auto"), "sana": ("uniform", "auto"),
    "lumina2": ("uniform", "auto"), "ideogram4": ("logit_normal", "auto"),
}  # fmt: skip
RATES = {"train_dreambooth.py": 5e-6, "train_dreambooth_lora.py": 5e-4, "train_dreambooth_lora_krea2.py": 3e-4}


def family_of(place, text):
    """The pipeline that a command needs."""
    script = re.search(r"train_dreambooth\w*\.py", text)[0]
    if "DeepFloyd/IF-II" in text:
        return "IFSuperResolutionPipeline"
    return "IFPipeline" if "DeepFloyd" in text else SCRIPTS[script].pipeline


def row_of(place, text):
    """The row that trains a command's base."""
    if "playground" in text:
        return FAMILIES["playground"]
    return next((row for row in FAMILIES.values() if row.pipeline == family_of(place, text)), None)


def flags_of(text):
    """(script, flags) by argparse, of a command whose variables are put in by hand."""
    for name, value in re.findall(r"^export (\w+)=[\"'](.*)[\"']$", text, re.M):
        text = text.replace(f"${name}", value.replace('"', r"\""))
    line = " ".join(line for line in text.replace("\\\n", " ").splitlines() if not line.startswith("export"))
    words = shlex.split(line)
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    parser = argparse.ArgumentParser()
    for word in words:
        if word.startswith("--") and f"--{word[2:].split('=')[0]}" not in parser._option_string_actions:
            parser.add_argument(f"--{word[2:].split('=')[0]}", nargs="*")
    told = vars(parser.parse_args([word for word in words[: script] if word.startswith("--")] + words[script + 1 :]))
    return words[script], {name: " ".join(value) for name, value in told.items() if value is not None}


def test_there_are_46_and_42_can_be_migrated():
    assert len(COMMANDS) == 46 and set(NEVER) <= set(COMMANDS)
    assert len(COMMANDS) - len(NEVER) == 42
    assert all(row_of(place, text) for place, text in COMMANDS.items() if place not in NEVER)


@pytest.mark.parametrize("place", COMMANDS)
def test_a_published_command_becomes_its_training_or_is_refused_by_name(place):
    text = COMMANDS[place]
    if place in NEVER:
        with pytest.raises(ConfigError, match=NEVER[place]):
            migrate(text)
        return
    result = migrate(text)
    assert_meaning(recipes.loads(result.recipe_yaml), result, *flags_of(text), row_of(place, text))


def assert_meaning(config, result, script, told, row):
    """Compare settings with a command's flags."""
    adaptive = told.get("optimizer", "").lower() == "prodigy"
    rate = 1e-4 if adaptive else float(told["learning_rate"]) if "learning_rate" in told else RATES.get(script, 1e-4)
    batch = int(told.get("train_batch_size", 4)) * int(told.get("gradient_accumulation_steps", 1))
    assert config.train.lr == pytest.approx(rate * (batch if "scale_lr" in told else 1))
    assert (config.train.batch, config.train.steps) == (batch, int(told["max_train_steps"]))
    assert config.train.method == ("lora" if "lora" in script else "full")
    assert (config.model.path, config.model.family) == (told["pretrained_model_name_or_path"], row.name)
    assert config.data.resolution == int(told["resolution"])
    assert config.seed == int(told.get("seed", 0))
    assert config.train.gradient_checkpointing == ("gradient_checkpointing" in told)
    asked = told.get("mixed_precision", "fp32")
    assert config.train.precision == ("bf16" if asked == "fp16" and row.denoiser != "unet" else asked)
    assert config.prior.weight == (float(told["prior_loss_weight"]) if "with_prior_preservation" in told else 0)
    assert config.train.text_encoder == ("train_text_encoder" in told and row.trains_text)
    if "lora" in script:
        rank = int(told.get("rank", 32 if "krea2" in script else 4))
        has_alpha = "lora_alpha" in SCRIPTS[script].defaults
        alpha = float(told.get("lora_alpha", 32 if "krea2" in script else 4)) if has_alpha else rank
        assert (config.lora.rank, config.lora.alpha or config.lora.rank) == (rank, alpha)
    kind = next((name for name in sorted(FLOW, key=len, reverse=True) if name in script), None)
    if kind:
        assert (config.objective.timesteps, config.objective.shift) == FLOW[kind]
    rows = yaml.safe_load(result.manifest_yaml)
    assert rows[0]["images"] == told.get("instance_data_dir", told.get("dataset_name"))
    said = {line.split()[0].rstrip(":")[2:] for line in result.dropped}
    known = {*KEYS, *SWITCHES, *USED, *DROPPED}
    assert set(told) <= known, "a flag of a published command is unknown"
    assert set(told) & set(DROPPED) <= said, "a flag is left out in silence"


@pytest.mark.parametrize("flags, key, value", [
    ("--weighting_scheme logit_normal --logit_mean 0.5 --logit_std 2", "objective.logit_mean", -0.5),
    ("--weighting_scheme logit_normal --logit_mean 0.5 --logit_std 2", "objective.logit_std", 2),
    ("--weighting_scheme logit_normal", "objective.timesteps", "logit_normal"),
    ("--weighting_scheme sigma_sqrt", "objective.timesteps", "uniform"),
    ("--lora_layers 'attn.to_k, ff.net.2'", "lora.targets", ("attn.to_k", "ff.net.2")),
    ("--mixed_precision bf16", "model.dtype", "bf16"), ("--mixed_precision no", "model.dtype", "fp32"),
    ("--use_aspect_ratio_buckets", "data.buckets", True),
    ("--cache_latents", "data.cache_latents", True), ("", "prior.sampler", "auto"),
    ("--optimizer prodigy --learning_rate 1.0", "train.lr", 1e-4), ("--learning_rate 3e-4", "train.lr", 3e-4),
    ("--optimizer adamW --learning_rate 3e-4", "train.lr", 3e-4)])  # fmt: skip
def test_flags_of_flow_scripts(flags, key, value):
    command = f"python train_dreambooth_lora_flux.py --pretrained_model_name_or_path m --instance_data_dir d {flags}"
    config = recipes.loads(migrate(command).recipe_yaml)
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value


def test_what_differs_is_said():
    def notes(flags, script="lora_flux"):
        told = migrate(f"python train_dreambooth_{script}.py --pretrained_model_name_or_path m {flags}")
        return "\n".join([*told.notes, *told.dropped])

    assert "trains with --guidance_scale 3.5, dbtrain with 1" in notes("")
    assert "dbtrain with 1" not in notes("--guidance_scale 1")
    assert "its sign is turned" in notes("--weighting_scheme logit_normal --logit_mean 1")
    assert "its sign is turned" not in notes("--weighting_scheme logit_normal --logit_mean 1", "lora_ideogram4")
    assert "captions have 77 tokens" in notes("", "lora_sd3")
    assert "10 20 30" in notes("", "lora_flux2_klein")
    assert "leaves out the shift" in notes("") and "leaves out the shift" not in notes("", "lora_sd3")
    assert "diffusers loads no adapter" in notes("--train_text_encoder")
    assert "--repeats 3: progress" in notes("--repeats=3")


def test_edm_is_for_the_base_that_was_trained_so():
    command = "python train_dreambooth_lora_sdxl.py --instance_data_dir d --pretrained_model_name_or_path "
    told = migrate(command + "x/playground-v2.5-1024px-aesthetic")
    assert "model:\n  family: playground" in told.recipe_yaml and any("EDM's own" in note for note in told.notes)
    with pytest.raises(ConfigError, match="its own scheduler is of another"):
        migrate(command + "stabilityai/stable-diffusion-xl-base-1.0 --do_edm_style_training")


@pytest.mark.parametrize("dataset, is_folder", [("./3d_icon", True), ("/data/3d", True), ("~/3d", True),
                                                ("../x", True), ("D:/pics", True), ("linoyts/3d_icon", False)])
def test_a_data_set_may_be_a_folder(dataset, is_folder):
    result = migrate(f"python train_dreambooth_lora.py --pretrained_model_name_or_path m --dataset_name={dataset} "
                     "--caption_column=prompt --image_column=image")  # fmt: skip
    assert yaml.safe_load(result.manifest_yaml)[0]["images"] == dataset
    assert any(line.startswith("--dataset_name") for line in result.dropped) is not is_folder
    assert any("metadata.jsonl" in note for note in result.notes)


def test_a_distilled_base_is_said_and_allowed():
    result = migrate("python train_dreambooth_lora_flux.py --pretrained_model_name_or_path x/FLUX.1-schnell")
    assert recipes.loads(result.recipe_yaml).model.distilled
    assert any("schnell" in note and "train on the base" in note for note in result.notes)


def test_every_script_of_the_tables_is_one_or_the_other():
    assert not set(SCRIPTS) & set(REFUSED) and len({*SCRIPTS, *REFUSED}) == 23
