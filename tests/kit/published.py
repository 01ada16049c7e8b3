"""The record of a subject that was never trained, and its folder, for tests of what is published of it."""

from pathlib import Path

from dbtrain.results.record import write_record

PUBLISHED = {
    "subject": "rex",
    "class": "dog",
    "identifier": "srx",
    "caption": "a photo of srx dog",
    "steps": 3,
    "seed": 0,
    "base": "some/base",
    "base_digest": "0" * 64,
    "data_digest": "1" * 64,
    "run": "2" * 64,
    "dbtrain": "0",
}


def make_result(folder: Path, run: str = "2", files: tuple[str, ...] = ("weights.bin", "model/vae/a.bin")) -> Path:
    """The folder of a finished subject with made-up files, which differ between runs."""
    for name in (*files, "samples.png", "samples/samples/0.png", "README.md", "config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} of {run}".encode() * 20)
    record = {**PUBLISHED, "subject": folder.name, "run": run * 64}
    write_record(folder, record, [folder / name for name in (*files, "samples.png")])
    return folder
