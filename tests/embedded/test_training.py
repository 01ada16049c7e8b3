"""The recipe's training pieces: schedule, Muon, latent folding, contrastive losses, resuming."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dbtrain.tiny import ASSETS, BASE, CLIP, IDENTITY
from dbtrain_embedded import autoencoder, encoders, loops, pool
from dbtrain_embedded.vocabulary import MAX_LENGTH, Captions


def test_pace_starts_low_peaks_and_ends_at_zero():
    assert loops.pace(0.0, 0, 100) == pytest.approx(0.01)
    assert loops.pace(0.0, 500, 100) == 1.0
    assert loops.pace(0.5, 500, 100) == pytest.approx(0.5)
    assert loops.pace(1.3, 500, 100) == pytest.approx(0.0)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=shape)).float()
    values = torch.linalg.svdvals(loops.orthogonalize(matrix))
    # Jordan's quintic leaves singular values in about [0.7, 1.2]; the square Gaussian's smallest ones lag behind.
    assert values.max() < 1.3 and values.median() > 0.65


def test_folded_vae_reconstructs_alike_with_unit_latents():
    torch.manual_seed(0)
    vae = autoencoder.build().eval().requires_grad_(False)
    vae.quant_conv.weight.mul_(3).add_(0.05)
    images = pool.held_out(8)[0]
    pixels = pool.to_tensor(images)
    before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    autoencoder.fold_normalization(vae, autoencoder.encode(vae, images))
    means = autoencoder.encode(vae, images)
    # fp32, five to six layers between: 1e-4 is a hundred roundings.
    assert torch.allclose(vae.decode(vae.encode(pixels).latent_dist.mean).sample, before, atol=1e-4)
    assert torch.allclose(means.mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(means.std(dim=(0, 2, 3)), torch.ones(16), atol=1e-4)


def test_identity_loss_knows_partners(monkeypatch):
    class Echo(torch.nn.Module):
        def forward(self, pixel_values):
            state = pixel_values.flatten(1)[:, None]
            return type("Out", (), {"last_hidden_state": state})

    views = torch.eye(6).reshape(6, 1, 2, 3)
    loss, hits = encoders.identity_loss(Echo(), views, views, temperature=0.1)
    assert float(hits) == 1 and float(loss) == pytest.approx(math.log(1 + 5 * math.exp(-10)), abs=1e-6)
    assert float(encoders.identity_loss(Echo(), views, views.roll(1, 0))[1]) == 0


def test_identifiers_go_before_the_noun():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    captions = Captions(tokenizer, ["a photo of a red dog on the beach"] * 4, ["dog"] * 4, share=1.0)
    rows = captions.take(np.arange(4), np.random.default_rng(0))
    dog, red = (tokenizer(word)["input_ids"][1] for word in ("dog", "red"))
    for row in rows:
        at, before = list(row).index(dog), list(row).index(red)
        assert at - before in (2, 3) and set(row[before + 1 : at]) <= set(captions.rare)
        assert len(row) == MAX_LENGTH


def test_augment_keeps_shape_and_is_seeded():
    pixels = pool.to_tensor(pool.held_out(4)[0])
    first = encoders.augment(pixels, np.random.default_rng(1))
    assert first.shape == pixels.shape
    assert torch.equal(first, encoders.augment(pixels, np.random.default_rng(1)))
    assert not torch.equal(first, encoders.augment(pixels, np.random.default_rng(2)))


def test_trainer_resumes_where_it_stopped(tmp_path):
    def trainer(minutes):
        torch.manual_seed(0)
        return loops.Trainer("toy", torch.nn.Linear(20, 20), tmp_path, minutes, 1e-2, muon=True)

    def loss_of(model):
        inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 20))).float()
        return lambda step: ((model(inputs) - inputs).square().mean(), {})

    first = trainer(0.01)
    first.run(loss_of(first.model))
    second = trainer(0.02)
    assert second.step == first.step > 0 and second.spent_s == first.spent_s
    assert torch.equal(second.model.weight, first.model.weight)
    second.run(loss_of(second.model))
    assert second.step > first.step
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8").count("finished") == 2


def test_the_shipped_tokenizer_is_not_overwritten(tmp_path):
    from dbtrain_embedded import recipe

    before = (BASE / "tokenizer" / "vocab.json").read_bytes()
    with pytest.raises(SystemExit, match="weights belong to it"):
        recipe.main(["tokenizer", "--work", str(tmp_path)])
    assert (BASE / "tokenizer" / "vocab.json").read_bytes() == before


def test_shipped_weights_can_be_trained_on_without_their_checkpoints(tmp_path, monkeypatch):
    """restore, a stage of no minutes each, export: the same weights, every bit."""
    from dbtrain_embedded import denoiser, export

    pool.draw(tmp_path, 8, workers=1)
    export.restore(tmp_path)
    assert np.load(tmp_path / "latents.npy").std() == pytest.approx(1, abs=0.3), "latents of the shipped, folded VAE"
    encoders.train_identity(tmp_path, 0)
    encoders.train_clip(tmp_path, 0, str(BASE / "tokenizer"), text_frozen=True)
    autoencoder.train_decoder(tmp_path, 0)
    denoiser.train(tmp_path, 0, str(BASE / "tokenizer"))
    shutil.copytree(BASE / "tokenizer", tmp_path / "base" / "tokenizer")
    for folder in (BASE, CLIP, IDENTITY):
        monkeypatch.setattr(export, folder.name.upper(), tmp_path / folder.name)
    export.export(tmp_path)
    files = [path.relative_to(ASSETS) for path in ASSETS.rglob("*.safetensors")]
    assert len(files) == 5
    for file in files:
        written, shipped = load_file(tmp_path / file), load_file(ASSETS / file)
        assert written.keys() == shipped.keys() and all(torch.equal(written[k], shipped[k]) for k in shipped), file
