"""kohya's command lines and TOML become the trainings that its scripts would have done."""

import pytest
import yaml

from dbtrain.errors import ConfigError
from dbtrain.settings import recipes
from dbtrain.verbs import kohya_scripts
from dbtrain.verbs.migrate import migrate

BASE = "accelerate launch --num_cpu_threads_per_process 1 {}train_network.py --pretrained_model_name_or_path m "
SD, SDXL, FLUX, SD3 = (BASE.format(name) for name in ("", "sdxl_", "flux_", "sd3_"))
# kohya's own documents, docs/flux_train_network.md of sd-scripts (Apache License 2.0), with the paths shortened.
DOCUMENTED = """
accelerate launch --num_cpu_threads_per_process 1 flux_train_network.py \\
  --pretrained_model_name_or_path=flux1-dev.safetensors --clip_l=clip_l.safetensors --t5xxl=t5.safetensors \\
  --ae=ae.safetensors --dataset_config=my_flux_dataset_config.toml --output_dir=o --output_name=my_flux_lora \\
  --save_model_as=safetensors --network_module=networks.lora_flux --network_dim=16 --network_alpha=1 \\
  --learning_rate=1e-4 --optimizer_type=AdamW8bit --lr_scheduler=constant --sdpa --max_train_epochs=10 \\
  --save_every_n_epochs=1 --mixed_precision=fp16 --gradient_checkpointing --guidance_scale=1.0 \\
  --timestep_sampling=flux_shift --model_prediction_type=raw --blocks_to_swap=18 --cache_text_encoder_outputs \\
  --cache_latents
"""


def config_of(text):
    result = migrate(text)
    return recipes.loads(result.recipe_yaml), result


def value(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_the_documented_command():
    config, result = config_of(DOCUMENTED)
    assert (config.model.family, config.model.dtype, config.model.path) == ("flux", "bf16", "flux1-dev.safetensors")
    assert (config.lora.rank, config.lora.alpha, config.train.lr) == (16, 1, 1e-4)
    assert (config.objective.timesteps, config.objective.shift, config.objective.logit_std) == (
        "logit_normal", "auto", 1)  # fmt: skip
    assert (config.prior.weight, config.prior.sampler, config.train.text_encoder) == (0, "auto", False)
    said = {line.split()[0] for line in result.dropped}
    assert {"--clip_l", "--t5xxl", "--ae", "--blocks_to_swap", "--dataset_config", "--max_train_epochs"} <= said
    assert any("set train.steps" in note for note in result.notes)
    assert not any("dbtrain with 1" in note for note in result.notes)


@pytest.mark.parametrize("base, flags, key, expected", [
    (SD, "", "lora.rank", 4), (SD, "", "lora.alpha", 1), (SD, "", "train.lr", 2e-6), (SD, "", "train.steps", 1600),
    (SD, "", "train.text_encoder", True), (SD, "--network_train_unet_only", "train.text_encoder", False),
    (SD, "--text_encoder_lr 0", "train.text_encoder", False),
    (SD, "--cache_text_encoder_outputs", "train.text_encoder", False),
    (SD, "--unet_lr 1e-4 --text_encoder_lr 5e-5 --learning_rate 3e-4", "train.lr", 1e-4),
    (SD, "--unet_lr 1e-4 --text_encoder_lr 5e-5 --learning_rate 3e-4", "train.text_encoder_lr", 5e-5),
    (SD, "--unet_lr 1e-4 --learning_rate 3e-4", "train.text_encoder_lr", 3e-4),
    (SD, "--learning_rate 3e-4", "train.text_encoder_lr", None),
    (SDXL, "--learning_rate 1e-4 --text_encoder_lr1=1e-5 --text_encoder_lr2=1e-5", "train.text_encoder_lr", 1e-5),
    (SD, "--resolution 512,768", "data.resolution", 624), (SD, "--resolution 1024", "data.resolution", 1024),
    (SD, "--network_args loraplus_lr_ratio=16 conv_dim=4", "lora.up_ratio", 16),
    (SD, "--enable_bucket", "data.buckets", True),
    (SD, "--min_snr_gamma 5", "objective.weighting", "min_snr"), (SD, "--min_snr_gamma 3", "objective.snr_gamma", 3),
    (SD, "--debiased_estimation_loss", "objective.weighting", "debiased"),
    (SD, "--noise_offset 0.05", "objective.noise_offset", 0.05), (SD, "--flip_aug", "data.flip", True),
    (SD, "--v_parameterization --zero_terminal_snr", "model.parameterization", "v_prediction"),
    (SD, "--v_parameterization --zero_terminal_snr", "model.zero_terminal_snr", True),
    (SD, "--masked_loss", "data.mask_floor", 0), (SD, "--max_grad_norm 0", "train.clip_norm", None),
    (SD, "--optimizer_args weight_decay=0.1 betas=0.9,0.99", "train.weight_decay", 0.1),
    (SD, "--optimizer_args weight_decay=0.1 betas=0.9,0.99", "train.beta2", 0.99),
    (SD, "--optimizer_type Prodigy --learning_rate 1", "train.lr", 1e-4),
    (SD, "--lr_scheduler cosine --lr_warmup_steps 0.1", "train.warmup_steps", 160),
    (SD, "--lr_scheduler cosine --lr_warmup_steps 50", "train.warmup_steps", 50),
    (SD, "--train_batch_size 2 --gradient_accumulation_steps 3", "train.batch", 6),
    (SD, "--reg_data_dir r --prior_loss_weight 0.5", "prior.weight", 0.5), (SD, "", "prior.weight", 0),
    (SD, "--network_weights a.safetensors", "lora.init", "a.safetensors"),
    (SD, "--log_with wandb", "track.wandb", "dreambooth"),
    (SD, "--xformers", "model.attention", "xformers"), (FLUX, "--xformers", "model.attention", "auto"),
    (SD, "--mixed_precision bf16", "model.dtype", "fp32"), (SD3, "--mixed_precision bf16", "model.dtype", "bf16"),
    (FLUX, "", "objective.shift", 3), (FLUX, "", "objective.timesteps", "uniform"),
    (FLUX, "--timestep_sampling shift --discrete_flow_shift 3.1582 --sigmoid_scale 2", "objective.shift", 3.1582),
    (FLUX, "--timestep_sampling shift --discrete_flow_shift 3.1582 --sigmoid_scale 2", "objective.logit_std", 2),
    (FLUX, "--timestep_sampling sigmoid", "objective.shift", 1),
    (FLUX, "--timestep_sampling uniform", "objective.shift", 1),
    (FLUX, "--weighting_scheme logit_normal --logit_mean 0.5", "objective.logit_mean", -0.5),
    (SD3, "--weighting_scheme logit_normal --logit_mean 0.5", "objective.logit_mean", 0.5),
    (SD3, "--training_shift 3", "objective.shift", 3), (SD3, "", "objective.shift", 1),
    (SD3, "", "train.text_encoder", False),
])  # fmt: skip
def test_a_flag_becomes_its_setting(base, flags, key, expected):
    assert value(config_of(base + flags)[0], key) == expected


@pytest.mark.parametrize("text, message", [
    (SD + "--network_module lycoris.kohya", "plain LoRA only"),
    (SD + "--network_train_text_encoder_only", "the denoiser is always trained"),
    (FLUX + "--model_type chroma", "FLUX.1 only"), ("python sdxl_train_network.py --seed 1", "want the base model"),
    (SD + "--config_file nowhere.toml", "nowhere.toml: cannot be read"), ("python train_db.py", "only these"),
])  # fmt: skip
def test_what_cannot_be_migrated_is_refused(text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        migrate(text)
    assert len(str(raised.value).splitlines()) == 1


DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = [768, 768]
batch_size = 3
  [[datasets.subsets]]
  image_dir = '{}'
  class_tokens = "sks girl"
  num_repeats = 7
  [[datasets.subsets]]
  image_dir = "more"
  class_tokens = "sks girl"
  [[datasets.subsets]]
  image_dir = "other"
  class_tokens = "zwx old teapot"
  [[datasets.subsets]]
  is_reg = true
  image_dir = "reg"
  class_tokens = "girl"
"""


def test_a_dataset_file_becomes_the_manifest(tmp_path):
    (tmp_path / "data.toml").write_text(DATASET.format(r"C:\pics"))
    config, result = config_of(f"{SD} --dataset_config {tmp_path / 'data.toml'} --max_train_epochs 4")
    assert yaml.safe_load(result.manifest_yaml) == [
        {"subject": "sks", "class": "girl", "images": [r"C:\pics", "more"], "identifier": "sks"},
        {"subject": "zwx", "class": "old teapot", "images": ["other"], "identifier": "zwx"},
    ]
    assert (config.data.resolution, config.train.batch, config.train.micro_batch) == (768, 3, 3)
    assert (config.prior.weight, config.data.caption) == (1, "{identifier} {class}")
    assert any("repeats (1, 7)" in note for note in result.notes)
    assert any("prior import" in note for note in result.notes)


def test_a_settings_file_is_read_alone_and_by_name(tmp_path):
    text = """
[model]
pretrained_model_name_or_path = "sd_xl_base_1.0.safetensors"
[training]
network_module = "networks.lora"
network_dim = 8
learning_rate = 1e-4
max_train_steps = 300
gradient_checkpointing = true
flip_aug = false
resolution = "1024,1024"
"""
    config, result = config_of(text)
    assert (config.model.family, config.lora.rank, config.train.steps) == ("sdxl", 8, 300)
    assert config.train.gradient_checkpointing and not config.data.flip
    assert any("read as a file for sdxl_train_network.py" in note for note in result.notes)
    (tmp_path / "own.toml").write_text(text)
    by_name = config_of(f"python sdxl_train_network.py --config_file {tmp_path / 'own'} --network_dim 32")[0]
    assert by_name == config.replaced("lora.rank", 32), "the command line decides over the file"
    assert config_of(text.replace("networks.lora", "networks.lora_sd3"))[0].model.family == "sd3"
    assert config_of(text.replace("1024", "512").replace("sd_xl_base", "v1"))[0].model.family == "sd"


def test_folders_of_kohya_become_the_manifest(tmp_path):
    photos = tmp_path / "img" / "10_zorbo gadget"
    photos.mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (32, 32)).save(photos / "a.png")
    rows = yaml.safe_load(config_of(f"{SD} --train_data_dir {tmp_path}")[1].manifest_yaml)
    assert [(row["identifier"], row["class"]) for row in rows] == [("zorbo", "gadget")]
    absent = config_of(f"{SD} --train_data_dir {tmp_path}/none")[1]
    assert any("dbtrain import kohya" in note for note in absent.notes)


def test_every_target_is_a_setting():
    keys = set(recipes.known_keys())
    assert {*kohya_scripts.KEYS.values(), *(key for key, _ in kohya_scripts.SWITCHES.values())} <= keys
    tables = [kohya_scripts.KEYS, kohya_scripts.SWITCHES, kohya_scripts.DROPPED, kohya_scripts.USED]
    assert sum(map(len, tables)) == len(set().union(*tables))
