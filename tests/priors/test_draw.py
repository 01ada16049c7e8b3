"""Priors are drawn once a class, by any number of ranks and runs at once, and whoever is killed is replaced."""

import io
import json
import os
import signal
import time
from contextlib import ExitStack

import numpy as np
from PIL import Image

from dbtrain.data.images import open_photo
from dbtrain.engines.world import World
from dbtrain.priors import draw as drawing
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import (
    BLOCK,
    missing_blocks,
    read_priors,
    store_damage,
)
from dbtrain.storage.atomic import held
from dbtrain.values import Role, Sample
from tests.kit.class_images import ALONE, FAMILY


def make(store, key, images, models, world=ALONE, batch=8, said=None) -> int:
    return make_priors(store, key, images, FAMILY, models, world, batch, (said if said is not None else []).append)


def digests(store) -> dict:
    return {path.relative_to(store): (path.stat().st_mtime_ns, path.read_bytes()) for path in store.rglob("*.*")}


def test_a_class_is_made_once_and_grows_without_remaking(tmp_path, models, key):
    said: list[str] = []
    assert make(tmp_path, key, 5, models, said=said) == 5
    assert len(said) == 1
    first, before = read_priors(tmp_path, key, 5), digests(tmp_path)
    assert make(tmp_path, key, 5, models) == 0
    assert make(tmp_path, key, 3, models) == 0
    assert digests(tmp_path) == before
    assert [one.image for one in read_priors(tmp_path, key, 3)] == [one.image for one in first[:3]]
    assert make(tmp_path, key, 8, models) == 3
    after = digests(tmp_path)
    assert {path: after[path] for path in before if path.suffix == ".tar"} == {
        path: one for path, one in before.items() if path.suffix == ".tar"
    }
    grown = read_priors(tmp_path, key, 8)
    assert [one.image for one in grown[:5]] == [one.image for one in first]
    assert len({one.image for one in grown}) == len({one.key for one in grown}) == 8


def test_growing_gives_the_images_of_making_all_at_once(tmp_path, models, key):
    for images in (2, 5, BLOCK + 3):
        make(tmp_path / "grown", key, images, models, batch=1)
    make(tmp_path / "once", key, BLOCK + 3, models, batch=1)
    grown, once = (read_priors(tmp_path / name, key, BLOCK + 3) for name in ("grown", "once"))
    assert [one.image for one in grown] == [one.image for one in once]
    assert [one.key for one in grown] == [one.key for one in once]


def test_ranks_share_the_blocks(tmp_path, models, key, monkeypatch):
    """Each block by exactly one rank; no image depends on which."""
    drawn = []

    def draw(pipeline, key, block, batch, beat):
        drawn.extend(block)
        for number in block:
            data = io.BytesIO()
            Image.new("RGB", (16, 16), (number, 0, 0)).save(data, "PNG")
            yield Sample(f"x-1-{number}", "x", Role.PRIOR, key.prompt, data.getvalue(), "png", {})

    monkeypatch.setattr(drawing, "_draw", draw)
    counts = [make(tmp_path, key, 3 * BLOCK + 1, models, World(rank, 3, "cpu")) for rank in range(3)]
    # The ranks come one after another here, so that later ones see the blocks of earlier ones.
    assert counts == [BLOCK + 1, BLOCK, BLOCK]
    assert not missing_blocks(tmp_path / key.name, 3 * BLOCK + 1)
    assert sorted(drawn) == list(range(3 * BLOCK + 1))
    found = [Image.open(io.BytesIO(one.image)).getpixel((0, 0))[0] for one in read_priors(tmp_path, key, 3 * BLOCK + 1)]
    assert found == list(range(3 * BLOCK + 1))


def test_images_do_not_depend_on_the_batch_they_are_drawn_in(tmp_path, models, key):
    """Own generators make equal noise; batched matrix products round differently, at most one level of 255."""
    made = {}
    for batch in (1, 4):
        make(tmp_path / str(batch), key, 4, models, batch=batch)
        samples = read_priors(tmp_path / str(batch), key, 4)
        made[batch] = np.stack([np.asarray(Image.open(io.BytesIO(one.image))) for one in samples]).astype(int)
    assert np.abs(made[1] - made[4]).max() <= 1
    assert np.abs(made[1][0] - made[1][1]).max() > 20


def test_samples_say_where_they_come_from(tmp_path, models, key):
    make(tmp_path, key, 2, models)
    for number, one in enumerate(read_priors(tmp_path, key, 2)):
        assert one.role == Role.PRIOR and one.caption == "a photo of a dog"
        assert one.key.endswith(f"-1-{number}") and one.meta["seed"] > 0
    assert json.loads((tmp_path / key.name / "key.json").read_text())["prompt"] == "a photo of a dog"


def drawing_child(store, key, images, models, log, first_pause_s=0.0):
    """A forked process that makes priors and logs the number of each image it draws."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        draw = drawing._draw

        def logged(pipeline, key, block, batch, beat):
            for number, sample in zip(block, draw(pipeline, key, block, batch, beat)):
                with open(log, "a") as file:
                    file.write(f"{os.getpid()} {number}\n")
                if number == 0:
                    time.sleep(first_pause_s)
                yield sample

        drawing._draw = logged
        make_priors(store, key, images, FAMILY, models, ALONE, 4)
        assert len(read_priors(store, key, images)) == images
        code = 0
    finally:
        os._exit(code)


def pixels(store, key, images):
    return [np.asarray(open_photo(one.image)).astype(int) for one in read_priors(store, key, images)]


def test_two_runs_at_once_make_each_image_once(tmp_path, models, key, store):
    log, images = tmp_path / "log", BLOCK + 2
    children = [drawing_child(tmp_path / "store", key, images, models, log, 0.5) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    drawn = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(number) for _, number in drawn) == list(range(images))
    assert len({pid for pid, _ in drawn}) == 2
    # The children draw by fours, the store by eights: batched matrix products round differently, by a level at most.
    for want, got in zip(*(pixels(place, key, images) for place in (store, tmp_path / "store")), strict=True):
        assert np.abs(want - got).max() <= 1


def test_a_waiting_run_takes_over_from_a_killed_one(tmp_path, models, key):
    log = tmp_path / "log"
    killed = drawing_child(tmp_path / "store", key, 2, models, log, 60)
    while not log.exists():
        time.sleep(0.01)
    said = []
    waiting = os.fork()
    if waiting == 0:
        code = 1
        try:
            make_priors(tmp_path / "store", key, 2, FAMILY, models, ALONE, 4, said.append)
            code = 0 if any("being drawn by another run; waiting" in line for line in said) else 7
        finally:
            os._exit(code)
    time.sleep(0.5)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == 0
    assert len(read_priors(tmp_path / "store", key, 2)) == 2
    assert store_damage(tmp_path / "store") == []


def test_drawing_and_waiting_for_another_run_show_life(tmp_path, models, key):
    """A fleet ends who is silent for long, and a block can take longer than that."""
    drawn: list[int] = []
    make_priors(tmp_path / "alone", key, 3, FAMILY, models, ALONE, 1, beat=lambda: drawn.append(1))
    assert len(drawn) >= 3
    beats: list[int] = []
    other = ExitStack()
    assert other.enter_context(held(tmp_path / key.name / ".block-000000.lock"))

    def beat():
        beats.append(1)
        if len(beats) == 4:
            other.close()

    assert make_priors(tmp_path, key, 3, FAMILY, models, ALONE, 8, beat=beat) == 3
    assert len(beats) >= 4 + 3


def test_a_request_to_stop_is_met_between_blocks(tmp_path, models, key):
    asked = iter([False, True])
    drawn = make_priors(tmp_path, key, 2 * BLOCK, FAMILY, models, ALONE, 8, stop=lambda: next(asked))
    assert drawn == BLOCK
    assert make_priors(tmp_path, key, BLOCK, FAMILY, models, ALONE, 8) == 0
