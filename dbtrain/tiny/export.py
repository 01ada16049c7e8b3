"""From checkpoints to package data: the pipeline folder and the two encoders, fp16 safetensors."""

import json
from pathlib import Path

import torch

from dbtrain.tiny import BASE, CLIP, IDENTITY, autoencoder, denoiser, encoders


def _average(path: Path, model):
    """`model` with the checkpoint's averaged weights, or as it is (fresh) when the stage has not run."""
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved.get("average", saved))
    return model.eval().half()


def _latest(work: Path, *names: str) -> Path:
    """The first of the checkpoints that exists, else the last: a later stage's file supersedes an earlier one's."""
    return next((work / name for name in names if (work / name).exists()), work / names[-1])


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
    """Have transformers widen the stored fp16 weights on loading, as diffusers does with its own."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_encoders(work: Path, tokenizer) -> None:
    """Write assets/clip and assets/identity."""
    clip = _average(_latest(work, "vision.pt", "clip.pt"), encoders.build_clip(tokenizer))
    clip.save_pretrained(CLIP)
    tokenizer.save_pretrained(CLIP)
    _processor("clip").save_pretrained(CLIP)
    _average(work / "identity.pt", encoders.build_identity()).save_pretrained(IDENTITY)
    _processor("identity").save_pretrained(IDENTITY)
    for folder in (CLIP, IDENTITY):
        _load_as_fp32(folder)


def pipeline(work: Path, tokenizer, unet_stage: str = "unet"):
    """The `StableDiffusionPipeline` of the checkpoints in `work`, fp16 weights (text tower of the CLIP pair)."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    clip = _average(work / "clip.pt", encoders.build_clip(tokenizer))
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    return StableDiffusionPipeline(
        vae=_average(_latest(work, "decoder.pt", "vae-folded.pt"), autoencoder.build()),
        text_encoder=text.eval().half(),
        tokenizer=tokenizer,
        unet=_average(work / f"{unet_stage}.pt", denoiser.build()),
        scheduler=denoiser.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(work: Path) -> None:
    """Write everything under assets/ that is trained; stages that have not run are exported untrained."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    pipe = pipeline(work, tokenizer)
    for part in ("vae", "text_encoder", "unet", "scheduler"):
        getattr(pipe, part).save_pretrained(BASE / part)
    _load_as_fp32(BASE / "text_encoder")
    pipe.save_config(BASE)
    export_encoders(work, tokenizer)
