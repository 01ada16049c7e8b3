"""What diffusers' DreamBooth scripts are: the pipeline that each trains, its defaults, and its flags.

Read in diffusers 0.42 (examples/dreambooth, examples/advanced_diffusion_training). The family of a script is the row
of `FAMILIES` with its pipeline, so a new family's script can be migrated as soon as its row is there.
"""

from dataclasses import dataclass
from typing import Any

from dbtrain.verbs.command_line import by_flag

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
JOINT = tuple(f"attn.{name}" for name in (*ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"))
FLUX = (*JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
FLUX2 = (*ATTENTION, "to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out")
KREA2 = ("img_in", "final_layer.linear", *ATTENTION, "to_gate", "ff.up", "ff.down", "text_fusion.projector",
         "txt_in.linear_1", "txt_in.linear_2", "time_embed.linear_1", "time_embed.linear_2",
         "time_mod_proj")  # fmt: skip

COMMON = {"train_batch_size": "4", "gradient_accumulation_steps": "1", "num_class_images": "100",
          "sample_batch_size": "4", "prior_loss_weight": "1.0", "checkpointing_steps": "500",
          "lr_scheduler": "constant", "lr_warmup_steps": "500", "num_validation_images": "4", "mixed_precision": "no",
          "learning_rate": "1e-4", "resolution": "512"}  # fmt: skip
LATER = {**COMMON, "adam_weight_decay": "1e-4"}
LORA = {**LATER, "rank": "4"}
ALPHA = {**LORA, "lora_alpha": "4"}
TEXT = {"text_encoder_lr": "5e-6"}


@dataclass(frozen=True)
class Script:
    """A script: diffusers' pipeline of the models that it trains, its method, those of its defaults that decide a
    result, the layers that its LoRA has, what it is trained with that dbtrain does otherwise.

    direct: its --logit_mean is that of the noise, and not of what is clean. flow: its noise levels are drawn by
    `--weighting_scheme`, whose default is here. dynamic: the scheduler of its models shifts them by the size of an
    image, which the script leaves out.
    """

    pipeline: str
    method: str
    defaults: dict[str, str]
    targets: tuple[str, ...] = ()
    flow: str | None = None
    dynamic: bool = False
    notes: tuple[str, ...] = ()
    direct: bool = False


GUIDED = "the script trains with --guidance_scale {guidance_scale}, dbtrain with 1, as the model's authors advise"
LENGTH = "the script's captions have {max_sequence_length} tokens, dbtrain's as many as the pipeline samples with"
KLEIN = ("the script's default --text_encoder_out_layers 10 20 30 is not what the pipeline samples with (9 18 27); "
         "dbtrain has the pipeline's")  # fmt: skip
CLEAN = ("the script's loss is the error of the clean image, which is sigma^2 times dbtrain's: it weighs noisy levels "
         "more")  # fmt: skip
EDM = ("the script's loss is the error of the clean image; dbtrain's is EDM's own, that of the U-Net's output, which "
       "weighs clean levels more")  # fmt: skip
WHOLE = (
    "bases in few bits (nf4, SDNQ) are not read: set model.path to a folder of the whole weights in bf16; captions of "
    "JSON are not taken, since braces stand for placeholders: write them as plain text"
)
MIRRORED = "the script mirrors the noise levels that it draws; here they are those of the model's scheduler"

SCRIPTS = {
    "train_dreambooth.py": Script("StableDiffusionPipeline", "full", {**COMMON, "learning_rate": "5e-6"}),
    "train_dreambooth_lora.py": Script(
        "StableDiffusionPipeline", "lora", {**COMMON, "learning_rate": "5e-4", "rank": "4"}),
    "train_dreambooth_lora_sdxl.py": Script(
        "StableDiffusionXLPipeline", "lora", {**LORA, **TEXT, "resolution": "1024"}),
    "train_dreambooth_lora_sd15_advanced.py": Script("StableDiffusionPipeline", "lora", {**LORA, **TEXT}),
    "train_dreambooth_lora_sdxl_advanced.py": Script(
        "StableDiffusionXLPipeline", "lora", {**LORA, **TEXT, "resolution": "1024"}),
    "train_dreambooth_sd3.py": Script(
        "StableDiffusion3Pipeline", "full", {**LATER, **TEXT, "max_sequence_length": "77"}, flow="logit_normal",
        notes=(LENGTH, CLEAN)),
    "train_dreambooth_lora_sd3.py": Script(
        "StableDiffusion3Pipeline", "lora", {**LORA, **TEXT, "max_sequence_length": "77"}, JOINT, "logit_normal",
        notes=(LENGTH, CLEAN)),
    "train_dreambooth_flux.py": Script(
        "FluxPipeline", "full", {**LATER, **TEXT, "guidance_scale": "3.5", "max_sequence_length": "77"}, (), "none",
        True, (GUIDED, LENGTH)),
    "train_dreambooth_lora_flux.py": Script(
        "FluxPipeline", "lora", {**ALPHA, **TEXT, "guidance_scale": "3.5"}, FLUX, "none", True, (GUIDED,)),
    "train_dreambooth_lora_flux_advanced.py": Script(
        "FluxPipeline", "lora", {**ALPHA, **TEXT, "guidance_scale": "3.5"}, FLUX, "none", True, (GUIDED,)),
    "train_dreambooth_lora_flux_kontext.py": Script(
        "FluxPipeline", "lora", {**ALPHA, **TEXT, "guidance_scale": "3.5"}, (*FLUX, "proj_mlp"), "none", True,
        (GUIDED,)),
    "train_dreambooth_lora_flux2.py": Script(
        "Flux2Pipeline", "lora", {**ALPHA, "guidance_scale": "3.5"}, FLUX2, "none", True, (GUIDED,)),
    "train_dreambooth_lora_flux2_klein.py": Script(
        "Flux2KleinPipeline", "lora", ALPHA, FLUX2, "none", True, (KLEIN,)),
    "train_dreambooth_lora_qwen_image.py": Script("QwenImagePipeline", "lora", ALPHA, ATTENTION, "none", True),
    "train_dreambooth_lora_z_image.py": Script("ZImagePipeline", "lora", ALPHA, ATTENTION, "none"),
    "train_dreambooth_lora_krea2.py": Script(
        "Krea2Pipeline", "lora", {**ALPHA, "rank": "32", "lora_alpha": "32", "learning_rate": "3e-4"}, KREA2, "none",
        True),
    "train_dreambooth_lora_sana.py": Script("SanaPipeline", "lora", ALPHA, ATTENTION[:3], "none"),
    "train_dreambooth_lora_lumina2.py": Script(
        "Lumina2Pipeline", "lora", LORA, ATTENTION, "none", notes=(MIRRORED,)),
    "train_dreambooth_lora_ideogram4.py": Script(
        "Ideogram4Pipeline", "lora", {**ALPHA, "logit_std": "1.5"}, (*ATTENTION, "w1", "w2", "w3"), "logit_normal",
        direct=True, notes=(WHOLE,)),
}  # fmt: skip
"""Scripts that can be migrated where a family has their pipeline."""

PAIRS = "it trains on pairs of pictures, and dbtrain on photos of a subject"
REFUSED = {
    "train_dreambooth_flax.py": "it is for Flax, and the base it names has weights that PyTorch does not read",
    "train_dreambooth_lora_hidream.py": "HiDream's routed experts see tokens in an order of their own, and it has four "
                                        "text encoders; dbtrain has no family for it",
    "train_dreambooth_lora_flux2_img2img.py": PAIRS,
    "train_dreambooth_lora_flux2_klein_img2img.py": PAIRS,
}  # fmt: skip
"""Scripts that cannot be migrated, with the reason."""

CASCADE = ("IFPipeline", "IFSuperResolutionPipeline")
"""Pipelines of DeepFloyd IF's stages, which `train_dreambooth.py` and `train_dreambooth_lora.py` train too."""

KEYS = {
    "pretrained_model_name_or_path": "model.path", "revision": "model.revision", "variant": "model.variant",
    "resolution": "data.resolution", "max_train_steps": "train.steps", "learning_rate": "train.lr",
    "text_encoder_lr": "train.text_encoder_lr", "adam_beta1": "train.beta1", "adam_beta2": "train.beta2",
    "adam_epsilon": "train.eps", "adam_weight_decay": "train.weight_decay", "max_grad_norm": "train.clip_norm",
    "train_batch_size": "train.micro_batch", "rank": "lora.rank", "lora_alpha": "lora.alpha",
    "snr_gamma": "objective.snr_gamma", "noise_offset": "objective.noise_offset",
    "logit_std": "objective.logit_std", "caption_dropout": "data.caption_dropout",
    "prior_loss_weight": "prior.weight", "num_class_images": "prior.images",
    "sample_batch_size": "prior.batch", "checkpointing_steps": "checkpoint.every_steps",
    "checkpoints_total_limit": "checkpoint.keep", "num_validation_images": "sample.images",
    "validation_steps": "sample.every_steps", "seed": "seed", "zero_stage": "engine.zero.stage",
}  # fmt: skip
"""Flags whose value is the value of a setting."""

SWITCHES: dict[str, tuple[str, Any]] = {
    "train_text_encoder": ("train.text_encoder", True), "random_flip": ("data.flip", True),
    "gradient_checkpointing": ("train.gradient_checkpointing", True), "offset_noise": ("objective.noise_offset", 0.1),
    "enable_xformers_memory_efficient_attention": ("model.attention", "xformers"),
    "cache_latents": ("data.cache_latents", True), "use_aspect_ratio_buckets": ("data.buckets", True),
}  # fmt: skip
"""Flags without a value, and the setting they stand for."""

DROPPED = by_flag({
    "class_data_dir": "class images are made by dbtrain, once per class; see prior.store",
    "resume_from_checkpoint": "running the same dbtrain command again resumes",
    "num_train_epochs": "progress is counted in steps; set train.steps",
    "validation_epochs": "samples are scheduled in steps; set sample.every_steps",
    "dataset_config_name": "dbtrain reads folders of photos",
    "cache_dir": "the hub's cache is set by HF_HOME",
    "repeats": "progress is counted in steps, so repeats change nothing",
    "dataloader_num_workers": "latents are cached, so loading needs no setting",
    "pretrained_vae_model_name_or_path": "the base's own VAE is used; put another one into a copy of the base folder",
    "tokenizer_name": "the base's own tokenizer is used",
    "output_dir": "given on the command line, as --out",
    "logging_dir": "logs lie in the output folder",
    "push_to_hub": "afterwards: dbtrain push OUT/subjects/ID --to USER/NAME",
    "hub_token hub_model_id": "dbtrain push has --to and takes HF_TOKEN",
    "allow_tf32": "a setting of the machine, not of the run",
    "prior_generation_precision": "class images are drawn in the run's precision",
    "pre_compute_text_embeddings": "always done while the text encoder is frozen (data.cache_text)",
    "set_grads_to_none": "always done",
    "use_dora": "plain LoRA only",
    "lora_dropout": "adapters have no dropout",
    "lr_num_cycles": "no restarts",
    "lr_power": "no polynomial schedule",
    "output_kohya_format": "use `dbtrain export`",
    "config_file": "launcher settings are not read; give num_processes so that the global batch is right",
    "adam_weight_decay_text_encoder": "train.weight_decay holds for all adapters",
    "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup": "AdamW only",
    "mode_scale": "no such distribution of timesteps",
    "precondition_outputs": "the loss is the error of the velocity",
    "train_text_encoder_ti train_text_encoder_ti_frac enable_t5_ti num_new_tokens_per_abstraction token_abstraction "
    "initializer_concept":
        "no token embeddings are trained; the identifier is a rare word of the vocabulary",
    "train_text_encoder_frac": "text encoders train to the end, or not at all",
    "train_transformer_frac": "the denoiser trains to the end",
    "clip_skip text_encoder_use_attention_mask tokenizer_max_length max_sequence_length system_prompt "
    "complex_human_instruction text_encoder_out_layers upsample_prompt prompt_enhancer_head_id":
        "captions are encoded as the family's pipeline does in sampling",
    "remote_text_encoder": "the base's own text encoder is loaded",
    "offload": "caches make it needless",
    "fsdp_text_encoder": "the text encoder is loaded whole",
    "do_fp8_training": "the frozen base is kept in bf16; model.quantize keeps it in 8 or 4 bits",
    "bnb_quantization_config_path": "see model.quantize",
    "disable_training_autocast": "the frozen base has the dtype of the computation",
    "guidance_scale": "training has its own guidance; set sample.guidance for pictures",
    "validation_guidance_scale": "set sample.guidance",
    "validation_num_inference_steps": "set sample.steps",
    "validation_model_path":
        "samples are drawn with the base; put the adapter onto the distilled model to draw with it",
    "validation_scheduler": "samples are drawn with the model's own scheduler",
    "validation_images": "samples are drawn from a prompt",
    "validation_image": "samples are drawn from a prompt",
    "vae_encode_mode": "latents are drawn from the autoencoder's posterior",
    "class_labels_conditioning": "the family of the cascade's second stage has it",
    "final_validation_prompt": "sample.prompts are drawn at the end",
    "skip_final_inference": "set sample.images=0",
    "upcast_before_saving": "adapters are saved in fp32",
    "skip_save_text_encoder": "a published model is whole",
    "image_interpolation_mode": "photos are resized by Lanczos",
    "aspect_ratio_buckets": "shapes have about data.resolution^2 pixels, from 1:2 to 2:1",
    "enable_vae_tiling": "latents are cached",
    "enable_npu_flash_attention": "for another kind of device",
    "use_blora lora_unet_blocks": "set lora.targets to the layers of these blocks",
    "local_rank": "the launcher gives it",
    "pretrained_tokenizer_4_name_or_path": "for another model",
    "pretrained_text_encoder_4_name_or_path": "the same",
})  # fmt: skip
"""Flags without a setting of the same meaning, with the reason."""

USED = frozenset("""
    with_prior_preservation class_prompt instance_prompt instance_data_dir center_crop scale_lr validation_prompt
    gradient_accumulation_steps mixed_precision lr_scheduler lr_warmup_steps report_to num_processes num_machines
    nproc_per_node nnodes num_gpus num_nodes offload_optimizer_device offload_param_device use_deepspeed multi_gpu
    dataset_name image_column caption_column cond_image_column optimizer weighting_scheme logit_mean lora_layers
    lora_blocks do_edm_style_training use_8bit_adam
""".split())
"""Flags that several settings follow from, or that say only how the script was started."""
