"""What a working folder sends, by Ray's own packing: the sources, and neither data nor secrets nor history."""

import zipfile

from dbtrain_launchers.on_ray import EXCLUDES

SENT = ["dbtrain/data/location.py", "dbtrain/tiny/assets/demo/subjects.csv", "dbtrain/tiny/assets/base/m.safetensors",
        "launchers/dbtrain_launchers/plan.py", "configs/recipes/tiny.yaml", "photos.csv", "key.py"]  # fmt: skip
KEPT = [".git/config", ".venv/bin/python", ".venv-gpu/x", "venv/x", ".env", ".env.local", "server.pem", "a/b.key",
        "id_rsa", "id_ed25519.pub", ".netrc", ".ssh/config", ".aws/credentials", ".ray/auth_token", ".ray-token-7",
        "data/x.jpg", "photos/rex/0.jpg", "runs/all/log.jsonl", "shards/shard-00000.tar", "priors/x", "demo/x.png",
        "deep/er/x.tar", "weights.ckpt", "x.log", "dbtrain/__pycache__/cli.pyc"]  # fmt: skip


def test_sources_are_sent_and_nothing_else(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "checkout"
    for name in [*SENT, *KEPT]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    target = tmp_path / "sent.zip"
    create_package(str(folder), target, include_gitignore=False, excludes=list(EXCLUDES))
    with zipfile.ZipFile(target) as archive:
        sent = {name for name in archive.namelist() if not name.endswith("/")}
    assert sent == set(SENT)
