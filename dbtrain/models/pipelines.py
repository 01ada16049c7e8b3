"""Stock diffusers pipelines put together from loaded models."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from dbtrain.models.family import Family, Models


def assemble(family: Family, models: Models, scheduler: str | None = None) -> Any:
    """The family's diffusers pipeline around the models; a scheduler class name replaces the model's own."""
    import diffusers

    chosen = models.scheduler
    if scheduler is not None:
        chosen = getattr(diffusers, scheduler).from_config(models.scheduler.config)
    parts = {family.denoiser: models.denoiser, "scheduler": chosen}
    parts |= {name: models.text_encoders.get(name) for name in family.text_encoders}
    parts |= models.companions | ({} if models.vae is None else {"vae": models.vae})
    parts |= {} if family.guide is None else {family.guide.scheduler: models.guide_scheduler}
    parts |= {**family.absent, **models.told}
    parts |= {name.replace("text_encoder", "tokenizer"): tokenizer for name, tokenizer in models.tokenizers.items()}
    pipeline = getattr(diffusers, family.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    if family.hear and models.texts is not None:
        family.hear(pipeline, models.texts)
    pipeline.dbtrain_words = partial(_words, family, models)
    return pipeline


def words(pipeline: Any, prompts: Sequence[str], negative: str | None, guidance: float) -> dict[str, Any]:
    """Arguments of a pipeline's call: prompts, what they are to be led away from, and what its family says beside."""
    ours = getattr(pipeline, "dbtrain_words", None)
    return ours(prompts, negative, guidance) if ours else _as_text(prompts, negative) | {"guidance_scale": guidance}


def _as_text(prompts: Sequence[str], negative: str | None) -> dict[str, Any]:
    return {"prompt": list(prompts), **({} if negative is None else {"negative_prompt": [negative] * len(prompts)})}


def _words(
    family: Family, models: Models, prompts: Sequence[str], negative: str | None, guidance: float
) -> dict[str, Any]:
    """The prompts as text where the encoders are loaded, else encoded."""
    call = family.call(models, guidance)
    avoided = family.avoided(models, guidance) if negative is None else negative
    if models.texts is None or family.hear:
        return _as_text(prompts, avoided if family.negative else None) | call
    device = str(next(models.denoiser.parameters()).device)
    given = family.embeds(models.texts.each(prompts, device))
    if avoided is not None:
        away = family.embeds(models.texts.each([avoided] * len(prompts), device))
        given |= {f"negative_{name}": value for name, value in away.items()}
    return given | call
