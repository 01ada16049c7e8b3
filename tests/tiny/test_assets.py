"""The package data: complete, small, loadable by the stock libraries."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

from dbtrain.tiny import ASSETS, BASE, CLIP, DEMO, DEMO_LARGE, DEMO_REAL, IDENTITY

SIZE_LIMIT = 27_000_000


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_all_assets_fit_in_27_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= SIZE_LIMIT


def test_weights_are_half_precision():
    from safetensors.torch import load_file

    for path in ASSETS.rglob("*.safetensors"):
        assert {str(tensor.dtype) for tensor in load_file(path).values()} == {"torch.float16"}, path


def test_stock_pipeline_generates(pipeline):
    import torch

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(
            pipeline("a photo of a sks dog on the beach", num_inference_steps=4, generator=generator).images[0], int
        )

    assert draw(1).shape == (64, 64, 3)
    assert np.array_equal(draw(1), draw(1)) and np.abs(draw(1) - draw(2)).mean() > 1


def test_latents_have_unit_variance_and_no_shift(pipeline):
    import torch

    from dbtrain_embedded import pool

    config = pipeline.vae.config
    assert config.scaling_factor == 1.0 and config.shift_factor is None
    with torch.no_grad():
        latents = pipeline.vae.encode(pool.to_tensor(pool.held_out(64)[0])).latent_dist.mean
    # 64 scenes x 64 places: the mean and deviation of a unit channel vary by about 0.1 between samples of scenes.
    assert latents.shape == (64, 16, 8, 8)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.4
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.4


def test_scheduler_ends_in_pure_noise(pipeline):
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-9)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.timestep_spacing == "trailing"


def test_tokenizer_round_trip_and_captions_are_whole_words(pipeline):
    from dbtrain_embedded import world

    tokenizer = pipeline.tokenizer
    for seed in range(100):
        caption = world.scene(seed)[1]
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" - ", "-") == caption
        assert len(ids) == len(re.findall(r"[a-z]+|-", caption)) + 2 <= tokenizer.model_max_length


def test_rare_tokens_exist_and_rank_last(pipeline):
    tokenizer = pipeline.tokenizer
    short = [i for t, i in tokenizer.get_vocab().items() if re.fullmatch(r"[bcdfghjklmnpqrstvwxz]{3}</w>", t)]
    assert len(short) > 300
    assert np.median(short) > 0.7 * len(tokenizer)
    assert len(tokenizer("sks")["input_ids"]) == 3
    assert len(tokenizer("xxy5syt00")["input_ids"]) > 5


def test_text_encoder_is_the_clip_pairs(pipeline):
    import torch
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(CLIP)
    ids = pipeline.tokenizer("a photo of a dog", return_tensors="pt", padding="max_length").input_ids
    with torch.no_grad():
        assert torch.equal(clip.text_model(ids).last_hidden_state, pipeline.text_encoder(ids).last_hidden_state)


@pytest.mark.parametrize("folder", [CLIP, IDENTITY])
def test_encoders_load_with_their_processors(folder):
    import torch
    from transformers import AutoImageProcessor, CLIPModel, ViTModel

    pixels = AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (100, 80)), return_tensors="pt")[
        "pixel_values"
    ]
    assert pixels.shape == (1, 3, 64, 64) and float(pixels.min()) == -1
    with torch.no_grad():
        if folder == CLIP:
            found = CLIPModel.from_pretrained(folder).get_image_features(pixel_values=pixels).pooler_output
        else:
            found = ViTModel.from_pretrained(folder, add_pooling_layer=False)(pixel_values=pixels).last_hidden_state[
                :, 0
            ]
    assert found.shape == (1, 128) and torch.isfinite(found).all()


@pytest.mark.parametrize(("manifest", "subjects", "classes"), [(DEMO, 8, 5), (DEMO_LARGE, 8, 5), (DEMO_REAL, 2, 2)])
def test_demo_manifests(manifest, subjects, classes):
    rows = list(csv.DictReader(manifest.open(encoding="utf-8")))
    assert len(rows) >= subjects and len({row["class"] for row in rows}) >= classes
    for row in rows:
        pictures = sorted((manifest.parent / row["images"]).iterdir())
        assert 4 <= len(pictures) <= 6
        for path in pictures:
            with Image.open(path) as image:
                assert image.mode == "RGB" and max(image.size) <= 160


def test_demo_has_several_dogs():
    rows = list(csv.DictReader(DEMO.open(encoding="utf-8")))
    assert sum(row["class"] == "dog" for row in rows) >= 3
