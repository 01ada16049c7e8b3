"""docs/sixty-lines.md runs, and writes the LoRA that `dbtrain train` writes, bit for bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.tiny import DEMO
from tests.kit.forked import dbtrain

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sixty-lines.md"
QUICK = ("train.steps=2", "prior.images=4", "prior.steps=2", "sample.steps=2")
LORA = "pytorch_lora_weights.safetensors"


@pytest.mark.slow
def test_the_page_and_the_command_write_the_same_lora(tmp_path):
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len([line for line in program.splitlines() if line.strip()]) <= 70
    (tmp_path / "sixty.py").write_text(program)
    command = [sys.executable, "sixty.py", "own", *QUICK]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}  # so that sums have one order
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "own" / "snow.png").stat().st_size > 1000
    (tmp_path / "photos.csv").write_text(
        f"subject,class,images,identifier\ndog-tan,dog,{DEMO.parent / 'dog-tan'},sks\n"
    )
    words = ("--subject", "dog-tan", "--config", "tiny", "--out", tmp_path / "run")
    assert dbtrain(["train", tmp_path / "photos.csv", *words, *QUICK]).returncode == 0
    ours, theirs = load_file(tmp_path / "own" / LORA), load_file(tmp_path / "run" / "subjects" / "dog-tan" / LORA)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
