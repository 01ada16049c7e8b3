"""What A1111, Forge and kohya read of an exported adapter, by rules restated from their code."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from dbtrain.models.adapters import LoraWeights
from dbtrain.results.publish import export_kohya

FACTS = {"subject": "rex", "identifier": "srx", "class": "dog"}


def exported(tmp_path, family, width=8, alpha=1.0, rank=2, **facts):
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    weights = LoraWeights({"unet": {path: (torch.ones(rank, width), torch.ones(3, rank))}}, alpha, rank)
    file = export_kohya(tmp_path / "some file.safetensors", weights, {**FACTS, "family": family, **facts})
    with safe_open(file, "pt") as opened:
        return file, opened.metadata()


def version_in_a1111(metadata):
    """`NetworkOnDisk.detect_version` of stable-diffusion-webui: what decides beside which bases it is shown."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if metadata.get("ss_v2", "") == "True" else "SD1" if metadata else "Unknown"


@pytest.mark.parametrize("family, width, version", [
    ("sd", 768, "SD1"), ("sd", 8, "SD1"), ("sd", 1024, "SD2"), ("sdxl", 2048, "SDXL")])  # fmt: skip
def test_a1111_shows_it_beside_its_own_bases(tmp_path, family, width, version):
    assert version_in_a1111(exported(tmp_path, family, width)[1]) == version


def test_name_numbers_and_trigger_words(tmp_path):
    metadata = exported(tmp_path, "sd")[1]
    assert (metadata["ss_output_name"], metadata["ss_network_module"]) == ("rex", "networks.lora")
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("2", 1.0)
    assert json.loads(metadata["ss_tag_frequency"]) == {"srx dog": {"srx dog": 1}}
    assert exported(tmp_path, "sd", subject="")[1]["ss_output_name"] == "some file"


def test_the_hashes_are_those_of_the_file(tmp_path):
    file, metadata = exported(tmp_path, "sd", width=400_000)  # more than the legacy hash's place, 1 MiB
    content = file.read_bytes()
    behind = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[behind:]).hexdigest()
    assert len(metadata["sshs_legacy_hash"]) == 8
    again = exported(tmp_path, "sd", width=400_000, subject="tom")[1]
    assert again["sshs_model_hash"] == metadata["sshs_model_hash"]
