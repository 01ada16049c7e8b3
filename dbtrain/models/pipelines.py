"""Stock diffusers pipelines put together from loaded models."""

from functools import partial
from typing import Any

from dbtrain.models.family import Family, Models


def assemble(family: Family, models: Models, scheduler: str | None = None) -> Any:
    """The family's diffusers pipeline around the models; a scheduler class name replaces the model's own."""
    import diffusers

    chosen = models.scheduler
    if scheduler is not None:
        chosen = getattr(diffusers, scheduler).from_config(models.scheduler.config)
    parts = {family.denoiser: models.denoiser, "scheduler": chosen, **models.text_encoders}
    parts |= {} if models.vae is None else {"vae": models.vae}
    parts |= {} if family.guide is None else {family.guide.scheduler: models.guide_scheduler}
    parts |= {**family.absent, **models.told}
    parts |= {name.replace("text_encoder", "tokenizer"): tokenizer for name, tokenizer in models.tokenizers.items()}
    pipeline = getattr(diffusers, family.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.dbtrain_call = partial(family.call, models)
    return pipeline


def arguments(pipeline: Any, guidance: float) -> dict[str, Any]:
    """What the family of a pipeline says to its call beside prompts, sizes and steps; of a stock one, the guidance."""
    call = getattr(pipeline, "dbtrain_call", None)
    return call(guidance) if call else {"guidance_scale": guidance}
