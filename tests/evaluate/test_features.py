"""Features against transformers' own processors and models, at the true sizes of the paper's encoders."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dbtrain.errors import ConfigError
from dbtrain.evaluate.features import load_identity, load_pair, read_preprocess
from dbtrain.tiny import CLIP, IDENTITY

PIXELS = 3e-6  # float32 of values up to 3 (2.4e-7 a unit): rescaling and normalizing round differently
FEATURES = 2e-5  # float32 through 12 layers, unit rows
SIZES = [(64, 64), (97, 61), (61, 97), (300, 200), (224, 225), (30, 40)]


def pictures(sizes=SIZES, seed=0):
    """Smooth and noisy RGB pictures of (width, height)."""
    stream = torch.Generator().manual_seed(seed)
    return [
        Image.fromarray(torch.randint(0, 256, (h, w, 3), generator=stream, dtype=torch.uint8).numpy()) for w, h in sizes
    ]


def processors():
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    small = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    return {
        "clip": CLIPImageProcessorPil(),
        "clip 64": CLIPImageProcessorPil(**small),
        "clip, crop beyond the border": CLIPImageProcessorPil(**{**small, "crop_size": {"height": 70, "width": 90}}),
        "clip, unresized": CLIPImageProcessorPil(do_resize=False, **small),
        "vit": ViTImageProcessorPil(),
        "dino": ViTImageProcessorPil(resample=3, **imagenet),
        "dino, oblong": ViTImageProcessorPil(size={"height": 48, "width": 80}, **imagenet),
        "plain": ViTImageProcessorPil(do_normalize=False),
        "dinov2": BitImageProcessorPil(size={"shortest_edge": 256}, resample=3, **imagenet),
    }


@pytest.mark.parametrize("name", processors())
def test_pixels_equal_transformers_own(name, tmp_path):
    theirs = processors()[name]
    theirs.save_pretrained(tmp_path)
    ours = read_preprocess(str(tmp_path))
    for image in pictures():
        want = torch.as_tensor(theirs(image, return_tensors="pt")["pixel_values"])
        assert (ours([image]) - want).abs().max() <= PIXELS


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_other_modes_become_rgb(mode):
    image = pictures([(40, 40)])[0].convert(mode)
    ours = read_preprocess(str(IDENTITY))
    assert torch.equal(ours([image]), ours([image.convert("RGB")]))


OLD_FORMS = [
    ({"feature_extractor_type": "ViTFeatureExtractor", "size": 32}, (32, 32), None),
    ({"image_processor_type": "CLIPImageProcessor", "size": 32, "do_center_crop": True, "crop_size": 9}, 32, (9, 9)),
    ({"image_processor_type": "BitImageProcessor", "size": 32, "do_center_crop": False, "crop_size": 9}, 32, None),
    ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, None, None),
]


@pytest.mark.parametrize("config, resize, crop", OLD_FORMS)
def test_older_forms_of_the_file(config, resize, crop, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = read_preprocess(str(tmp_path))
    assert (found.resize, found.crop) == (resize, crop)


BAD_FORMS = [
    ({"size": {"longest_edge": 9}}, "size {'longest_edge': 9} is not known"),
    ({"image_mean": [0.5]}, "no RGB pictures"),
]


@pytest.mark.parametrize("config, message", BAD_FORMS)
def test_unknown_preprocessing_is_refused(config, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        read_preprocess(str(tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [None, "no json"])
def test_a_folder_without_preprocessing_says_what_to_give(content, tmp_path):
    if content:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match="give an image encoder's folder"):
        load_identity(str(tmp_path))


def test_a_folder_without_weights_says_what_to_give(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    with pytest.raises(ConfigError, match="cannot be loaded as an encoder"):
        load_identity(str(tmp_path))


def test_vit_s16_class_token(true_sizes):
    from transformers import ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = true_sizes / "vit"
    model = ViTModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    images, theirs = pictures([(64, 64), (90, 70), (70, 90)]), ViTImageProcessorPil.from_pretrained(folder)
    got = load_identity(str(folder)).images(images, batch=2)
    with torch.no_grad():
        states = model(**theirs(images, return_tensors="pt")).last_hidden_state
    want = states[:, 0] / states[:, 0].norm(dim=-1, keepdim=True)
    assert sum(p.numel() for p in model.parameters()) == 21_665_664
    assert got.shape == (3, 384) and (got - want).abs().max() <= FEATURES
    assert (got[0] - got[1]).abs().max() > 100 * FEATURES


def test_clip_vit_b32_projected_embeddings(true_sizes):
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = true_sizes / "clip"
    model, theirs = (
        CLIPModel.from_pretrained(folder, dtype=torch.float32),
        CLIPImageProcessorPil.from_pretrained(folder),
    )
    images, texts = pictures([(64, 64), (90, 70)]), ["a photo of a dog", "a red car on the beach in space", "cat"]
    pair = load_pair(str(folder))
    got_images, got_texts = pair.images(images), pair.texts(texts, batch=2)
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = model(**theirs(images, return_tensors="pt"), **tokens)
    assert sum(p.numel() for p in model.parameters()) == 151_277_313
    assert (got_images - want.image_embeds).abs().max() <= FEATURES
    assert (got_texts - want.text_embeds).abs().max() <= FEATURES
    assert got_texts.shape == (3, 512) and (got_texts[0] - got_texts[1]).abs().max() > 100 * FEATURES


def tiny_models(tmp_path):
    """Folders of a small random CLIP pair and ViT, as transformers saves them."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, ViTConfig, ViTModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision = {"image_size": 64, "patch_size": 16}
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), **special}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config={**tower, **text}, vision_config={**tower, **vision}, projection_dim=8))
        vit = ViTModel(ViTConfig(**tower, **vision), add_pooling_layer=False)
    for part in (clip, tokenizer, processors()["clip 64"]):
        part.save_pretrained(tmp_path / "clip")
    processors()["clip 64"].save_pretrained(tmp_path / "vit")
    vit.save_pretrained(tmp_path / "vit")
    return str(tmp_path / "clip"), str(tmp_path / "vit")


def test_encoders_from_folders(tmp_path):
    clip, vit = tiny_models(tmp_path)
    before = torch.random.get_rng_state()
    pair, identity = load_pair(clip), load_identity(vit)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (pair.name, identity.name) == (clip, vit)
    assert pair.images(pictures()).shape == (len(SIZES), 8) and identity.images(pictures()).shape == (len(SIZES), 16)
    assert pair.images(pictures()).norm(dim=-1).tolist() == pytest.approx([1.0] * len(SIZES), abs=1e-6)
    assert load_identity(clip).images(pictures()).shape == (len(SIZES), 8)
    with pytest.raises(ConfigError, match="has no text side"):
        load_pair(vit)
    with pytest.raises(ConfigError, match="knows no texts"):
        identity.texts(["a"])


def test_dinov2_has_its_class_token_and_patches(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    from dbtrain.evaluate.patches import patch_distances

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=64, patch_size=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    processor = processors()["dinov2"]
    processor.crop_size = processor.size = {"height": 64, "width": 64}
    processor.save_pretrained(tmp_path)
    encoder, images = load_identity(str(tmp_path)), pictures()[:3]
    with torch.no_grad():
        states = model(pixel_values=encoder.preprocess(images)).last_hidden_state[:, 0]
    want = states / states.norm(dim=-1, keepdim=True)
    assert (encoder.images(images) - want).abs().max() <= FEATURES
    assert patch_distances(encoder, images).shape == (3,)


def tiny(kind, tmp_path, **options):
    """The folder of a small random vision model of transformers, with ViT's preprocessing."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(image_size=64, **options))
    model.save_pretrained(tmp_path)
    processors()["clip 64"].save_pretrained(tmp_path)
    return str(tmp_path)


TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
CONVOLUTIONS = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.mark.parametrize("kind, options", [
    ("Swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    ("ConvNext", CONVOLUTIONS),
    ("Cvt", {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
])  # fmt: skip
def test_encoders_whose_first_row_is_a_patch_are_refused(kind, options, tmp_path):
    folder = tiny(kind, tmp_path, **options)
    with pytest.raises(ConfigError, match="give a ViT, DINO"):
        load_identity(folder).images(pictures())


@pytest.mark.parametrize("kind, marks", [("ViT", 1), ("DeiT", 2), ("Dinov2", 1), ("Dinov2WithRegisters", 5)])
def test_what_comes_before_the_patches_is_known(kind, marks, tmp_path):
    from dbtrain.evaluate.patches import patch_distances

    encoder = load_identity(tiny(kind, tmp_path, **TOWER))
    assert encoder.marks == marks
    hidden = encoder.vision(pixel_values=encoder.preprocess(pictures()[:2]), output_hidden_states=True).hidden_states
    assert {layer.shape[1] for layer in hidden} == {marks + 16}  # 64 x 64 pixels are 4 x 4 patches
    assert patch_distances(encoder, pictures()[:3]).shape == (3,)


def test_clip_has_one_mark_before_its_patches():
    assert (load_pair().marks, load_identity().marks) == (1, 1)


def test_pickles_are_not_opened(tmp_path):
    vit = tiny_models(tmp_path)[1]
    weights = Path(vit) / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match="give a transformers folder with safetensors weights"):
        load_identity(vit)


def test_code_that_comes_with_an_encoder_is_not_run(tmp_path, monkeypatch):
    vit = Path(tiny_models(tmp_path)[1])
    (vit / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    config = json.loads((vit / "config.json").read_text())
    named = {"AutoConfig": "own.C", "AutoModel": "own.M"}
    (vit / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": named}))
    monkeypatch.setattr("builtins.input", lambda *words: "y")  # the answer that one types without reading
    with pytest.raises(ConfigError, match="cannot be loaded as an encoder"):
        load_identity(str(vit))
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_refused(tmp_path):
    vit = tiny_models(tmp_path)[1]
    weights = load_file(f"{vit}/model.safetensors")
    left_out = next(key for key in weights if key.endswith("layernorm.weight"))
    save_file(
        {key: value for key, value in weights.items() if key != left_out}, f"{vit}/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=f"lacks 1 weights of a ViTModel .such as {left_out}"):
        load_identity(vit)


def test_damaged_weights_are_named(tmp_path):
    identity = load_identity(tiny_models(tmp_path)[1])
    identity.model.layernorm.weight[0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        identity.images(pictures())


def test_batches_do_not_change_features(tmp_path):
    pair = load_pair(tiny_models(tmp_path)[0])
    images, texts = pictures(), [f"a photo of a {word}" for word in ("dog", "cat", "very red car in the snow")]
    assert (pair.images(images) - pair.images(images, batch=1)).abs().max() <= FEATURES
    assert (pair.texts(texts) - pair.texts(texts, batch=1)).abs().max() <= FEATURES


def test_embedded_encoders_are_the_default():
    if not (CLIP / "model.safetensors").exists():
        pytest.skip("the embedded encoders are not trained yet")
    pair, identity = load_pair(), load_identity()
    assert (pair.name, identity.name) == ("embedded/clip", "embedded/identity")
    assert pair.images(pictures()).shape[1] == pair.texts(["a dog"]).shape[1]


def test_long_texts_are_cut_to_the_encoders_length(tmp_path):
    pair = load_pair(tiny_models(tmp_path)[0])
    long = "a photo of a dog " * 60
    assert torch.equal(pair.texts([long]), pair.texts([long + "in the snow"]))
    pair.tokenizer.model_max_length = 10**30
    assert pair.texts([long]).shape == (1, 8)
