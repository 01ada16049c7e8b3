"""Stock diffusers pipelines put together from loaded models."""

from typing import Any

from dbtrain.models.family import Family, Models


def assemble(family: Family, models: Models, scheduler: str | None = None) -> Any:
    """The family's diffusers pipeline around the models; a scheduler class name replaces the model's own."""
    import diffusers

    chosen = models.scheduler
    if scheduler is not None:
        chosen = getattr(diffusers, scheduler).from_config(models.scheduler.config)
    parts = {family.denoiser_name: models.denoiser, "vae": models.vae, "scheduler": chosen, **models.text_encoders}
    parts |= {name.replace("text_encoder", "tokenizer"): tokenizer for name, tokenizer in models.tokenizers.items()}
    if family.name == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, family.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
