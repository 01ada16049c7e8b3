"""The notebook of the documents: its cells run in order, as in a kernel, with an event loop under way."""

import asyncio
import json
from pathlib import Path

from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
QUICK = ["train.steps=2", "prior.images=2", "prior.steps=1", "sample.steps=2", "sample.images=1", "track.every_steps=1",
         "checkpoint.every_steps=1"]  # fmt: skip


def test_every_cell_runs_and_the_training_goes_on(tmp_path, monkeypatch):
    notebook = json.loads(NOTEBOOK.read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and "SETTINGS = []" in cells[0]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names = {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)

    async def run():
        for source in cells:
            quick = source.replace("SETTINGS = []", f"SETTINGS = {QUICK}").replace("['steps'] + 20", "['steps'] + 1")
            exec(compile(quick.replace("num_inference_steps=25", "num_inference_steps=2"), "cell", "exec"), names)

    asyncio.run(run())
    assert len(names["losses"]) in (3, 4) and names["poodle"].record["steps"] == 3
    assert isinstance(names["both"], Image.Image) and names["both"].getextrema() != ((0, 0),) * 3
    first, second = (picture.tobytes() for picture in names["pictures"])
    assert first != second and names["scores"]["subjects"]
