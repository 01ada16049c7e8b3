"""From the shipped weights to checkpoints, through every later stage, and back."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dbtrain.tiny import ASSETS, BASE, CLIP, IDENTITY
from dbtrain_embedded import autoencoder, denoiser, encoders, export, pool, upscaler


def test_shipped_weights_can_be_trained_on_without_their_checkpoints(tmp_path, monkeypatch):
    """restore, a stage of no minutes each, export: the same weights, every bit."""
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
    upscaler.train(tmp_path, 0)
    upscaler.export(tmp_path, tmp_path / "upscaler")
    files = [path.relative_to(ASSETS) for path in ASSETS.rglob("*.safetensors")]
    assert len(files) == 7
    for file in files:
        written, shipped = load_file(tmp_path / file), load_file(ASSETS / file)
        assert written.keys() == shipped.keys() and all(torch.equal(written[k], shipped[k]) for k in shipped), file
