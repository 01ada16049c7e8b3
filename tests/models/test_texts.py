"""Text encoders and denoiser are never held together, and a text is encoded once."""

import weakref

import torch

from dbtrain.engines.world import World
from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.models.pipelines import words
from dbtrain.models.sampling import make_pipeline
from dbtrain.models.texts import joined
from dbtrain.settings.config import ModelConfig
from dbtrain.training.bank import captions_of
from dbtrain.training.session import Base
from dbtrain.values import Conditioning
from tests.kit.main_job import small_config

ALONE = World(0, 1, "cpu")
GROUPS = [("a photo of zq dog", "a photo of a dog"), ("a cat",), ("a cat",)]


def late_base(model_folders, *words):
    model = ["model.family=flux", f"model.path={model_folders['flux']}", "data.resolution=64", "prior.sampler=auto"]
    return Base.load(small_config(*model, *words), ALONE, late=True)


def test_the_denoiser_comes_when_the_encoders_are_gone(model_folders):
    base = late_base(model_folders)
    texts, parts, seen = base.models.texts, base.models.load, []
    load = texts.load

    def watched():
        encoders = load()
        seen.extend(weakref.ref(module) for module in encoders.values())
        return encoders

    def afterwards(names):
        assert len(seen) == 2 and not any(one() for one in seen), "encoders are still held"
        return parts(names)

    texts.load, base.models.load = watched, afterwards
    assert not [*base.models.denoiser.parameters()] and base.models.text_encoders == {}
    base.ready(GROUPS)
    assert sum(param.numel() for param in base.models.denoiser.parameters()) > 400_000
    assert base.models.attention is not None and not base.models.pending
    base.ready(GROUPS)
    captions_of(base.family, base.models, base.settings, GROUPS[0], "cpu")
    assert len(seen) == 2, "texts that are known were encoded again"
    base.ready([("another",)])
    assert len(seen) == 4 and [*texts.kept] == [("another",)]
    denoiser = base.models.denoiser
    base.reload()
    assert base.models.denoiser is not denoiser and [*base.models.texts.kept] == [("another",)]


def test_texts_are_encoded_as_by_encoders_that_are_kept(model_folders):
    base = late_base(model_folders)
    base.ready(GROUPS)
    whole = load_models(FAMILIES["flux"], base.settings.model)
    for group in GROUPS:
        apart, held = (captions_of(base.family, one, base.settings, group, "cpu") for one in (base.models, whole))
        assert torch.equal(apart.states_BTD, held.states_BTD) and torch.equal(apart.pooled_BD, held.pooled_BD)


def test_encoders_stay_where_they_train_or_encode_at_every_step(model_folders):
    base = late_base(model_folders, "data.cache_text=false")
    assert base.models.texts is None and len(base.models.text_encoders) == 2


def test_rows_are_joined_field_by_field():
    parts = [Conditioning(torch.full((1, 2, 3), float(n)), mask_BT=torch.tensor([[True, n > 0]])) for n in range(2)]
    both = joined(parts)
    assert both.pooled_BD is None and both.states_BTD[:, 0, 0].tolist() == [0, 1]
    assert both.mask_BT.tolist() == [[True, False], [True, True]]
    assert both.to(torch.bfloat16).mask_BT.dtype == torch.bool


def test_what_guidance_leads_away_from_is_what_the_pipeline_would_take(model_folders):
    """SDXL's zeros, Qwen-Image's blank, without which it has no guidance; the empty text for most."""
    wanted = {"sd": [""], "sdxl": None, "qwen_image": [" "], "zimage": [""], "flux": None}
    for name, want in wanted.items():
        family = FAMILIES[name]
        models = load_models(family, ModelConfig(family=name, path=str(model_folders[name])))
        assert words(make_pipeline(family, models), ["a dog"], None, 5.0).get("negative_prompt") == want, name
        given = words(make_pipeline(family, models), ["a dog"], "blur", 5.0).get("negative_prompt")
        assert given == (["blur"] if family.negative else None), name
