"""From checkpoints to the shipped assets (pipeline folder and two encoders, fp16 safetensors), and back."""

import json
from pathlib import Path

import torch

from dbtrain.tiny import BASE, CLIP, IDENTITY
from dbtrain_embedded import autoencoder, denoiser, encoders, upscaler
from dbtrain_embedded.loops import device, weights


def _load(model, work: Path, *stages: str):
    """`model` in fp16, with the averaged weights of the first of the stages that has some; untrained where none has."""
    state = weights(work, *stages)
    if state is not None:
        model.load_state_dict(state)
    return model.eval().half()


def _processor(kind: str):
    """The image processor of a 64-pixel encoder: bicubic to 64, centre crop, [-1, 1]."""
    import transformers

    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if kind == "clip":
        return transformers.CLIPImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **norm
        )
    return transformers.ViTImageProcessor(size={"height": 64, "width": 64}, resample=3, **norm)


def _load_as_fp32(folder: Path) -> None:
    """Write fp32 as dtype into a model's config.json, so that transformers loads the stored fp16 weights as fp32.

    diffusers does so without being asked.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_encoders(work: Path, tokenizer) -> None:
    """Write assets/clip and assets/identity."""
    clip = _load(encoders.build_clip(tokenizer), work, "vision", "clip")
    clip.save_pretrained(CLIP)
    tokenizer.save_pretrained(CLIP)
    _processor("clip").save_pretrained(CLIP)
    _load(encoders.build_identity(), work, "identity").save_pretrained(IDENTITY)
    _processor("identity").save_pretrained(IDENTITY)
    for folder in (CLIP, IDENTITY):
        _load_as_fp32(folder)


def pipeline(work: Path, tokenizer):
    """The `StableDiffusionPipeline` of the checkpoints in `work`, in fp16, with the CLIP pair's text tower."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    clip = _load(encoders.build_clip(tokenizer), work, "clip")
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    return StableDiffusionPipeline(
        vae=_load(autoencoder.build(), work, "decoder", "vae-folded"),
        text_encoder=text.eval().half(),
        tokenizer=tokenizer,
        unet=_load(denoiser.build(), work, "unet"),
        scheduler=denoiser.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(work: Path) -> None:
    """Write all trained models under assets/; the model of a stage that has not run is written untrained."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    pipe = pipeline(work, tokenizer)
    for part in ("vae", "text_encoder", "unet", "scheduler"):
        getattr(pipe, part).save_pretrained(BASE / part)
    _load_as_fp32(BASE / "text_encoder")
    pipe.save_config(BASE)
    export_encoders(work, tokenizer)
    if weights(work, "upscaler") is not None:
        upscaler.export(work)
        _load_as_fp32(upscaler.UPSCALER / "text_encoder")


def restore(work: Path) -> None:
    """Write the shipped weights to `work` as starting points of the later stages, and the pool's latents beside them.

    These stages then train on from the shipped weights, without the checkpoints of the run that made these weights.
    Their optimizers start anew.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, ViTModel

    shipped = {
        "clip": CLIPModel.from_pretrained(CLIP),
        "identity": ViTModel.from_pretrained(IDENTITY, add_pooling_layer=False),
        "unet": UNet2DConditionModel.from_pretrained(BASE / "unet"),
        "upscaler": UNet2DConditionModel.from_pretrained(upscaler.UPSCALER / "unet"),
    }
    for stage, model in shipped.items():
        torch.save(model.state_dict(), work / f"{stage}-start.pt")
    vae = AutoencoderKL.from_pretrained(BASE / "vae").eval().requires_grad_(False).to(device())
    denoiser.write_latents(work, vae.to(memory_format=torch.channels_last))
