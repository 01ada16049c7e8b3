"""Migration of diffusers command lines: values against the scripts' own documentation, and what is refused."""

from functools import reduce

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.errors import ConfigError
from dbtrain.settings import recipes
from dbtrain.verbs import migrate
from dbtrain.verbs.diffusers_scripts import DROPPED, KEYS, SWITCHES, USED

# From examples/dreambooth/README.md of diffusers: LoRA is shortened, the first is whole.
README_PRIOR = """
export MODEL_NAME="CompVis/stable-diffusion-v1-4"
export INSTANCE_DIR="path to/rex"
export CLASS_DIR="path-to-class-images"
export OUTPUT_DIR="path-to-save-model"

accelerate launch --num_processes=2 train_dreambooth.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --instance_data_dir="$INSTANCE_DIR" \\
  --class_data_dir=${CLASS_DIR} \\
  --output_dir=$OUTPUT_DIR \\
  --with_prior_preservation --prior_loss_weight=0.5 \\
  --instance_prompt="a photo of sks dog" \\
  --class_prompt="a photo of dog" \\
  --resolution=512 \\
  --train_batch_size=2 \\
  --gradient_accumulation_steps=3 --gradient_checkpointing \\
  --use_8bit_adam \\
  --learning_rate=5e-6 \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --num_class_images=200 \\
  --max_train_steps=800
"""
LORA = "python train_dreambooth_lora.py --pretrained_model_name_or_path m --instance_data_dir d"
SDXL = LORA.replace("lora.py", "lora_sdxl.py")


def value_of(config, key):
    """The setting of a dotted key."""
    return reduce(getattr, key.split("."), config)


def config_of(text):
    result = migrate.migrate(text)
    return recipes.loads(result.recipe_yaml), result


def test_the_readmes_command_becomes_the_same_training():
    config, result = config_of(README_PRIOR)
    assert config.model.path == "CompVis/stable-diffusion-v1-4"
    assert (config.model.family, config.train.method) == ("sd", "full")
    assert (config.train.batch, config.train.micro_batch) == (12, 2)
    assert (config.train.lr, config.train.steps, config.train.warmup_steps) == (5e-6, 800, 0)
    assert config.train.gradient_checkpointing
    assert (config.prior.weight, config.prior.images) == (0.5, 200)
    assert config.data.caption == "a photo of {identifier} {class}"
    assert config.data.class_caption == "a photo of {class}"
    assert yaml.safe_load(result.manifest_yaml) == [
        {"subject": "rex", "class": "dog", "images": "path to/rex", "identifier": "sks"}]
    dropped = [line.split(":")[0].split()[0] for line in result.dropped]
    assert dropped == ["--class_data_dir", "--output_dir"]
    assert config.train.optimizer == "adamw8bit"
    adapter, result = config_of(f"{LORA} --use_8bit_adam")
    assert adapter.train.optimizer == "adamw" and not any("8bit" in line for line in result.dropped)
    assert "optimizer states are fp32; those of an adapter are small" in result.notes
    assert not any("$" in note for note in result.notes)


@pytest.mark.parametrize(("command", "expected"), [
    (LORA.replace("_lora", ""), {"train.lr": 5e-6, "train.batch": 4, "data.resolution": 512}),
    (LORA, {"train.lr": 5e-4, "lora.rank": 4, "prior.weight": 0, "checkpoint.every_steps": 500, "data.crop": "random"}),
    (SDXL, {"train.lr": 1e-4, "data.resolution": 1024, "model.family": "sdxl", "train.weight_decay": 1e-4}),
], ids=["full", "lora", "sdxl"])
def test_the_scripts_defaults_are_written_out(command, expected):
    config, _ = config_of(command)
    for key, value in expected.items():
        assert value_of(config, key) == value, key


FLAGS = [
    ("--revision abc", "model.revision", "abc"), ("--variant=fp16", "model.variant", "fp16"),
    ("--resolution 768", "data.resolution", 768), ("--center_crop", "data.crop", "center"),
    ("--random_flip", "data.flip", True), ("--train_text_encoder", "train.text_encoder", True),
    ("--max_train_steps=7", "train.steps", 7), ("--learning_rate 2e-3", "train.lr", 2e-3),
    ("--train_text_encoder --text_encoder_lr 1e-5", "train.text_encoder_lr", 1e-5),
    ("--text_encoder_lr 1e-5", "train.text_encoder_lr", None),
    ("--train_batch_size 2 --gradient_accumulation_steps 4", "train.batch", 8),
    ("--train_batch_size 2 --scale_lr --learning_rate 1e-4", "train.lr", 2e-4),
    ("--lr_scheduler linear --lr_warmup_steps 20", "train.warmup_steps", 20),
    ("--lr_scheduler constant --lr_warmup_steps 20", "train.warmup_steps", 0),
    ("--lr_scheduler constant_with_warmup --lr_warmup_steps 20", "train.warmup_steps", 20),
    ("--lr_scheduler linear --max_train_steps 400", "train.warmup_steps", 399),
    ("--lr_scheduler polynomial", "train.schedule", "linear"),
    ("--lr_scheduler=cosine_with_restarts", "train.schedule", "cosine"),
    ("--adam_beta1 0.8", "train.beta1", 0.8), ("--adam_epsilon 1e-6", "train.eps", 1e-6),
    ("--adam_weight_decay 0", "train.weight_decay", 0), ("--max_grad_norm 2", "train.clip_norm", 2),
    ("--mixed_precision fp16", "train.precision", "fp16"), ("--mixed_precision no", "train.precision", "fp32"),
    ("--rank 32", "lora.rank", 32), ("--snr_gamma 4", "objective.weighting", "min_snr"),
    ("--snr_gamma 4", "objective.snr_gamma", 4),
    ("--offset_noise", "objective.noise_offset", 0.1), ("--with_prior_preservation", "prior.weight", 1),
    ("--with_prior_preservation", "prior.images", 100), ("--sample_batch_size 8", "prior.batch", 8),
    ("--checkpointing_steps 50", "checkpoint.every_steps", 50), ("--checkpoints_total_limit 9", "checkpoint.keep", 9),
    ("--validation_prompt 'A sks dog here' --instance_prompt 'a sks dog'", "sample.prompts", ("A {subject} here",)),
    ("--validation_prompt x --num_validation_images 3", "sample.images", 3),
    ("--validation_steps 7", "sample.every_steps", 7),
    ("--seed 5", "seed", 5), ("--report_to wandb", "track.wandb", "dreambooth"),
    ("--enable_xformers_memory_efficient_attention", "model.attention", "xformers"),
]


@pytest.mark.parametrize(("flags", "key", "value"), FLAGS, ids=[f"{row[0]}>{row[1]}" for row in FLAGS])
def test_a_flag_becomes_its_setting(flags, key, value):
    config, result = config_of(f"{LORA} {flags}")
    assert value_of(config, key) == value
    if flags != "--lr_scheduler polynomial" and "restarts" not in flags:
        assert not result.dropped


@pytest.mark.parametrize(("launcher", "batch"), [
    ("accelerate launch --num_processes 8", 32), ("torchrun --nproc_per_node=4 --nnodes=2", 32), ("python3", 4),
    ("deepspeed --num_gpus 2", 8), ("accelerate launch --multi_gpu --num_processes=3 --num_machines 1", 12)])
def test_the_global_batch_counts_processes(launcher, batch):
    config, _ = config_of(LORA.replace("python", launcher, 1))
    assert config.train.batch == batch


def test_the_launchers_deepspeed_flags_are_kept():
    config, _ = config_of(LORA.replace(
        "python", "accelerate launch --use_deepspeed --zero_stage 3 --offload_param_device cpu --num_processes 1", 1))
    assert config.engine.zero.stage == 3
    assert config.engine.zero.offload_parameters


@pytest.mark.parametrize(("instance", "prior", "identifier", "noun", "caption"), [
    ("a photo of sks dog", "a photo of dog", "sks", "dog", "a photo of {identifier} {class}"),
    ("a photo of a TOK dog", "a photo of a dog", "TOK", "dog", "a photo of a {identifier} {class}"),
    ("photo of olis stuffed animal on grass", "", "olis", "stuffed animal", "photo of {identifier} {class} on grass"),
    ("a sks toy", "a toy", "sks", "toy", "a {identifier} {class}"),
    ("a photo of zwx", "a photo of a man", "zwx", "man", "a photo of {identifier}"),
    ("ohwx qqv cat, high quality", "cat", "ohwx qqv", "cat", "{identifier} {class}, high quality")])
def test_identifier_and_class_noun_come_from_the_prompts(instance, prior, identifier, noun, caption):
    config, result = config_of(
        f"{LORA} --with_prior_preservation --instance_prompt '{instance}' --class_prompt '{prior}'")
    row = yaml.safe_load(result.manifest_yaml)[0]
    assert (row["identifier"], row["class"], config.data.caption) == (identifier, noun, caption)


def test_prompts_without_an_identifier_are_noted():
    _, result = config_of(f"{LORA} --instance_prompt ''")
    row = yaml.safe_load(result.manifest_yaml)[0]
    assert "identifier" not in row
    assert any("identifier" in note for note in result.notes)
    assert any("class noun" in note for note in result.notes)


def test_unknown_flags_and_unset_variables_are_called_out():
    _, result = config_of(f"{LORA} --instance_data_dir $PHOTOS --frobnicate 3 --dataset_name x/y")
    assert "--frobnicate 3: unknown to dbtrain" in result.dropped
    assert any(line.startswith("--dataset_name x/y: ") for line in result.dropped)
    assert any(note.startswith("$PHOTOS was not set") for note in result.notes)


def test_min_snr_with_prior_preservation_is_noted():
    assert any("5791" in note for note in config_of(f"{LORA} --snr_gamma 5 --with_prior_preservation")[1].notes)


@pytest.mark.parametrize(("command", "message"), [
    ("accelerate launch train_dreambooth_lora_hidream.py", "cannot be migrated: HiDream"),
    ("accelerate launch train_dreambooth_lora_flux2_img2img.py", "pairs of pictures"),
    ("python train_dreambooth_flax.py --seed 1", "is for Flax"),
    ("accelerate launch train_dreambooth_lora_sd3.py", "without --pretrained_model_name_or_path"),
    (f"{SDXL} --do_edm_style_training", "EDM's form"),
    (f"{LORA.replace('lora', 'lora_flux_advanced')} --train_transformer_frac=0", "token embeddings alone"),
    ("python train_text_to_image.py", "only these are understood"), ("", "no script"), ("ls -l", "no script"),
    ("python train_dreambooth.py --seed 1", "without --pretrained_model_name_or_path"),
    (LORA + " --instance_prompt 'a", "check the quotes"),
    (LORA + " --train_batch_size many", "--train_batch_size: got 'many'"),
    (LORA + " --learning_rate fast", "migrated recipe:.*train.lr: got 'fast', want a number"),
    (LORA + " --resolution 513 --rank 0", "resolution: got 513(.|\n)*lora.rank: got 0")])
def test_what_cannot_be_migrated_is_refused(command, message):
    with pytest.raises(ConfigError, match=message):
        migrate.migrate(command)


def test_every_target_is_a_setting():
    keys = set(recipes.known_keys())
    assert {*KEYS.values(), *(key for key, _ in SWITCHES.values())} <= keys
    assert not set(KEYS) & set(DROPPED)
    assert not USED & {*KEYS, *SWITCHES, *DROPPED}
    assert all(DROPPED.values())


ALL_FLAGS = [*KEYS, *SWITCHES, *DROPPED, *sorted(USED)]
VALUES = ["", "1", "-1", "0", "a {b} [c", "1e-4", "'x: y'", "nan", "é"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(ALL_FLAGS), max_size=6), st.lists(st.sampled_from(VALUES), min_size=6, max_size=6))
def test_every_command_gives_a_valid_recipe_or_a_clean_error(flags, values):
    words = " ".join(f"--{flag} {value}" for flag, value in zip(flags, values, strict=False))
    try:
        config, result = config_of(f"{LORA} {words}")
    except ConfigError as error:
        assert error.findings and all(one.startswith("migrate") for one in error.findings)  # noqa: PT017
        return
    assert recipes.loads(recipes.render(config)) == config
    told = [line.split()[0].rstrip(":") for line in result.dropped]
    assert {f"--{flag}" for flag in flags if flag in DROPPED} <= set(told)
    assert {"subject", "class", "images"} <= yaml.safe_load(result.manifest_yaml)[0].keys()


ENDS = {"bash": "\\\n", "spaces behind it": "\\  \n", "cmd": "^\n", "cmd, spaces": "^ \n", "PowerShell": "`\n",
        "Windows lines": "\\\r\n", "cmd with Windows lines": "^\r\n"}  # fmt: skip


@pytest.mark.parametrize("shell", ENDS)
def test_lines_go_on_as_in_every_shell(shell):
    text = LORA.replace(" --", f" {ENDS[shell]}  --") + f' {ENDS[shell]}--instance_prompt="a photo of zwx gadget"\n'
    config, result = config_of(text)
    assert config.model.path == "m"
    assert yaml.safe_load(result.manifest_yaml) == [
        {"subject": "d", "class": "gadget", "images": "d", "identifier": "zwx"}
    ]


@pytest.mark.parametrize("written, read", [
    (r"D:\pics\zorbo", "D:/pics/zorbo"), (r'"D:\my pics\zorbo"', "D:/my pics/zorbo"), (r".\pics\zorbo", "./pics/zorbo"),
    (r"pics\zorbo", "pics/zorbo"), (r"\\server\pics\zorbo", "//server/pics/zorbo"), (r"..\pics", "../pics"),
    (r"my\ pics/zorbo", "my pics/zorbo"), ("'my pics/zorbo'", "my pics/zorbo"), ("/mnt/pics", "/mnt/pics")])
def test_paths_of_every_shell(written, read):
    for mark in (" ", "="):
        text = LORA.replace("--instance_data_dir d", f"--instance_data_dir{mark}{written}")
        assert yaml.safe_load(config_of(text)[1].manifest_yaml)[0]["images"] == read


@pytest.mark.parametrize("prompt, identifier, noun, caption", [
    ("a shiny zwx gadget", "zwx", "gadget", "a shiny {identifier} {class}"),
    ("close up portrait of zwx person", "zwx", "person", "close up portrait of {identifier} {class}"),
    ("a photo of sks dog", "sks", "dog", "a photo of {identifier} {class}"),
    ("a photo of ohwx man", "ohwx", "man", "a photo of {identifier} {class}"),
    ("a tiny old xjq42 teapot", "xjq42", "teapot", "a tiny old {identifier} {class}"),
    ("a photo of <s1> corgi", "<s1>", "corgi", "a photo of {identifier} {class}"),
    ("a gadget zwx", "zwx", "gadget", "a {class} {identifier}")])
def test_the_identifier_is_the_word_that_is_none_and_the_guess_is_said(prompt, identifier, noun, caption):
    config, result = config_of(f'{LORA} --instance_prompt="{prompt}"')
    row = yaml.safe_load(result.manifest_yaml)[0]
    assert (row["identifier"], row["class"], config.data.caption) == (identifier, noun, caption)
    assert sum("guessed from" in note and identifier in note for note in result.notes) == 1
    with_class = config_of(f'{LORA} --instance_prompt="{prompt}" --class_prompt="a {noun}"')[1]
    assert not any("guessed from" in note for note in with_class.notes)
