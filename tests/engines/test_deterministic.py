"""`engine.deterministic` lets PyTorch run nothing whose result depends on the run, and nothing else changes it."""

import os

import pytest
import torch

from dbtrain.engines.deterministic import choose_algorithms
from dbtrain.families import FAMILIES
from dbtrain.models.attention import engage_attention
from dbtrain.models.load import load_models
from dbtrain.settings.config import EngineConfig, ModelConfig


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)


def test_it_is_off_unless_asked_for():
    choose_algorithms(EngineConfig())
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_every_switch_is_set():
    choose_algorithms(EngineConfig(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_attention_is_then_not_chosen_by_time(sd_folder, monkeypatch):
    denoiser = load_models(FAMILIES["sd"], ModelConfig(path=str(sd_folder))).denoiser
    choose_algorithms(EngineConfig(deterministic=True))
    engaged = engage_attention(denoiser, "auto", "cuda")
    assert (engaged.name, engaged.reason) == ("sdpa", "auto: engine.deterministic allows no choice by time")
