"""The protocol on a finished run: which pictures are asked for, that they are kept, and what is written of them."""

import json
import math
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.evaluate import protocol
from dbtrain.evaluate.features import load_identity, load_pair
from dbtrain.evaluate.photos import read_photos
from dbtrain.evaluate.protocol import PROTOCOLS, Protocol, evaluate_finished, shots
from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from tests.kit.forked import start
from tests.kit.main_job import small_config

SMALL = ("--protocol", "dreambooth", "--images", "2", "--class-images", "3", "--batch", "4")
SAME = 1e-6  # float32 rows from the encoder; its batches differ from ours


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("evaluation*"))
    return tmp_path / "out"


def record(subject="rex", noun="dog"):
    return {
        "subject": subject,
        "class": noun,
        "identifier": "srx",
        "base_digest": "b",
        "base": "x",
        "run": "r",
        "files": {"pytorch_lora_weights.safetensors": f"digest of {subject}", "samples.png": "s"},
    }


def planned(how, tmp_path, subject="rex", noun="dog"):
    config = small_config()
    wanted = PROTOCOLS[how.protocol](how, config, noun)
    return shots(tmp_path / "subjects" / subject, record(subject, noun), config, wanted, how)


def test_the_papers_protocol_is_25_prompts_of_4_images(tmp_path):
    how = Protocol("dreambooth")
    for noun, other in (("dog", "wearing a santa hat"), ("vase", "with the Eiffel Tower in the background")):
        own, of_base = planned(how, tmp_path, noun=noun)
        tuned = [shot for shot in own if shot.row == "tuned"]
        assert len(tuned) == 100 and len({shot.prompt for shot in tuned}) == 25
        assert f"a srx {noun} {other}" in {shot.prompt for shot in tuned}
        assert [shot.prompt for shot in own if shot.row == "class"] == [f"a photo of a {noun}"] * 25
        assert all("srx" not in shot.prompt for shot in of_base) and len(of_base) == 125
        assert len({shot.file for shot in own + of_base}) == 250 and len({shot.seed for shot in tuned}) == 100


def test_seeds_are_a_function_of_subject_prompt_and_image(tmp_path):
    how = Protocol("dreambooth")
    own, of_base = planned(how, tmp_path)
    again, same_base = planned(how, tmp_path, subject="ann")
    assert own == planned(how, tmp_path)[0]
    fewer = {(shot.row, shot.number, shot.image): shot.seed for shot in planned(replace(how, images=2), tmp_path)[0]}
    assert fewer.items() <= {(shot.row, shot.number, shot.image): shot.seed for shot in own}.items()
    pairs = [(a.seed, b.seed) for a, b in zip(own, again) if a.row == "tuned"]
    assert all(a != b for a, b in pairs)
    assert of_base == same_base
    classes = [[shot.seed for shot in row if shot.row.endswith("class")] for row in (own, again, of_base)]
    assert classes[0] == classes[1] == classes[2]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"overrides": ("sample.steps=3",)},
        {"overrides": ("sample.guidance=2",)},
        {"overrides": ("data.resolution=64",)},
    ],
)
def test_a_files_name_holds_what_decides_it(tmp_path, change):
    how, changed = Protocol("dreambooth"), Protocol("dreambooth", **change)
    config, other = small_config(), small_config(*changed.overrides)
    folder, wanted = tmp_path / "rex", PROTOCOLS["dreambooth"](how, config, "dog")
    before = {shot.file for rows in shots(folder, record(), config, wanted, how) for shot in rows}
    after = {shot.file for rows in shots(folder, record(), other, wanted, changed) for shot in rows}
    assert not before & after
    retrained = {**record(), "files": {"pytorch_lora_weights.safetensors": "another"}}
    own, of_base = shots(folder, retrained, config, wanted, how)
    assert not before & {shot.file for shot in own} and {shot.file for shot in of_base} <= before


def test_a_run_is_evaluated_and_its_files_hold_to_the_contract(out):
    result = run("evaluate", out, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    assert table == json.loads((out / "evaluation.json").read_text())
    assert (table["subjects"], table["failed"], table["left_out"]) == (3, {}, 0)
    # Two dogs share the base's pictures: 2 classes, 1 prompt of 2 images and 4 of the class prompt.
    assert table["counts"] == {"tuned": 6, "class": 12, "base": 12, "real": 6}
    for folder in (out / "subjects").iterdir():
        found = json.loads((folder / "evaluation.json").read_text())
        assert found["schema"] == 1 and found["encoders"]["identity"] == "embedded/identity"
        assert found["encoders"]["distance"] == "patch distance of embedded/identity"
        assert set(found["scores"]) == {"dino", "clip_i", "clip_t", "clip_t_plain", "pres", "div"}
        assert set(found["base"]) == {"dino", "clip_i", "clip_t_plain", "pres", "div"}
        assert set(found["real"]) == {"dino", "clip_i"}
        for score in (cell for part in ("scores", "base", "real") for cell in found[part].values()):
            assert score["low"] is None or score["low"] <= score["value"] <= score["high"]
        assert found["scores"]["div"]["low"] is None  # one prompt: nothing to draw anew
        assert found["scores"]["dino"]["low"] < found["scores"]["dino"]["value"]
        for image in found["images"]:
            assert (folder / image["file"]).is_file() and image["row"] in ("tuned", "base", "class")
        # What training drew for the same prompt and seeds is taken over, bit for bit.
        tuned = sorted(image["file"] for image in found["images"] if image["row"] == "tuned")
        drawn = sorted((folder / "samples" / "samples").glob("*.png"))
        assert [(folder / name).read_bytes() for name in tuned] == [path.read_bytes() for path in drawn]
    assert len(list((out / "evaluation" / "base" / "dog").glob("*.png"))) == 6


def plain_mean(here, there):
    total = [
        sum(float(x) * float(y) for x, y in zip(a, b)) for a in here.double().tolist() for b in there.double().tolist()
    ]
    return sum(total) / len(total)


def test_scores_equal_plain_loops_over_the_listed_pictures(out):
    assert run("evaluate", out, *SMALL, "--subject", "rex", "--quiet").exit_code == 0
    folder = out / "subjects" / "rex"
    found = json.loads((folder / "evaluation.json").read_text())
    rows = {}
    for image in found["images"]:
        rows.setdefault(image["row"], []).append((image["prompt"], image["told"], Image.open(folder / image["file"])))
    photos = read_photos(folder, "rex", small_config())
    identity, pair = load_identity(), load_pair()
    real, tuned = identity.images(photos), [image for _, _, image in rows["tuned"]]
    of_class = [image for _, _, image in rows["class"]]
    before = [image for asked, _, image in rows["base"] if asked == "a photo of a dog"]
    scores = found["scores"]
    assert (len(tuned), len(of_class), len(before)) == (50, 3, 3)
    assert scores["dino"]["value"] == pytest.approx(plain_mean(identity.images(tuned), real), abs=SAME)
    assert scores["pres"]["value"] == pytest.approx(plain_mean(identity.images(of_class), real), abs=SAME)
    assert found["base"]["pres"]["value"] == pytest.approx(plain_mean(identity.images(before), real), abs=SAME)
    assert found["real"]["dino"]["value"] == pytest.approx(float((real[0] * real[1]).sum()), abs=SAME)
    for name, texts in (
        ("clip_t", [asked for asked, _, _ in rows["tuned"]]),
        ("clip_t_plain", [asked.replace(f"{found['identifier']} ", "") for asked, _, _ in rows["tuned"]]),
    ):
        images, told = pair.images(tuned), pair.texts(texts)
        want = sum(float((a * b).sum()) for a, b in zip(images, told)) / len(tuned)
        assert scores[name]["value"] == pytest.approx(want, abs=SAME)
    assert scores["dino"]["count"] == 100 and scores["clip_t"]["count"] == 50 and scores["div"]["count"] == 25


def test_a_killed_evaluation_goes_on_and_gives_the_same(out, tmp_path):
    shutil.copytree(out, tmp_path / "whole")
    assert run("evaluate", tmp_path / "whole", *SMALL, "--subject", "mug", "--quiet").exit_code == 0
    process = start(["evaluate", out, *SMALL, "--subject", "mug"])
    pictures = out / "subjects" / "mug" / "evaluation"
    end = time.monotonic() + 120
    while len(list(pictures.glob("*.png")) if pictures.exists() else []) < 10 and time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in pictures.glob("*.png")}
    assert 10 <= len(kept) < 53 and not (out / "subjects" / "mug" / "evaluation.json").exists()
    assert run("evaluate", out, *SMALL, "--subject", "mug", "--quiet").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    files = [
        json.loads((root / "subjects" / "mug" / "evaluation.json").read_text()) for root in (out, tmp_path / "whole")
    ]
    assert files[0] == files[1]
    for image in files[0]["images"]:
        both = [(root / "subjects" / "mug" / image["file"]).read_bytes() for root in (out, tmp_path / "whole")]
        assert both[0] == both[1]


def test_the_same_again_draws_nothing_and_damage_is_drawn_anew(out, monkeypatch):
    words = ("evaluate", out / "subjects" / "rex", "--quiet")
    first = run(*words, "--json")
    assert first.exit_code == 0, first.output
    drawn = []
    real = protocol.generate
    monkeypatch.setattr(
        protocol,
        "generate",
        lambda *inputs, **options: drawn.append(list(inputs[1])) or real(*inputs, **options),
    )
    assert run(*words, "--json").stdout == first.stdout and drawn == []
    picture = next((out / "subjects" / "rex" / "evaluation").glob("class-*.png"))
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-40])
    assert run(*words, "--json").stdout == first.stdout and len(drawn) == 1
    assert picture.read_bytes() == whole


def test_changed_samples_are_not_taken_over(out):
    folder = out / "subjects" / "rex"
    singles = sorted((folder / "samples" / "samples").iterdir())
    assert sorted(json.loads((folder / "record.json").read_text())["samples"]) == [path.name for path in singles]
    Image.new("RGB", (32, 32), "red").save(singles[0])
    assert run("evaluate", folder, "--quiet").exit_code == 0
    tuned = sorted((folder / "evaluation").glob("tuned-*.png"))
    assert tuned[0].read_bytes() != singles[0].read_bytes() and tuned[1].read_bytes() == singles[1].read_bytes()


def test_samples_without_digests_are_drawn_anew(out):
    folder = out / "subjects" / "rex"
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "samples": None}))
    for path in (folder / "samples" / "samples").iterdir():
        Image.new("RGB", (32, 32), "red").save(path)
    assert run("evaluate", folder, "--quiet").exit_code == 0
    assert Image.open(next((folder / "evaluation").glob("tuned-*.png"))).getpixel((0, 0)) != (255, 0, 0)


def test_a_base_picture_that_is_drawn_anew_is_new_for_every_subject(out):
    first = json.loads(run("evaluate", out, "--json", "--quiet").stdout)
    picture = sorted((out / "evaluation" / "base" / "dog").glob("base-*.png"))[0]
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-40])  # in place: what is linked to it is damaged with it
    linked = [out / "subjects" / name / "evaluation" / picture.name for name in ("rex", "ann")]
    assert [path.read_bytes() for path in linked] == [whole[:-40]] * 2
    again = run("evaluate", out, "--json", "--quiet")
    assert json.loads(again.stdout) == first
    assert [path.read_bytes() for path in (picture, *linked)] == [whole] * 3


def test_a_worker_evaluates_on_its_own_base_and_gives_it_back(out):
    family, config = FAMILIES["sd"], small_config()
    models = load_models(family, config.model)
    before = {name: value.clone() for name, value in models.denoiser.state_dict().items()}
    found = evaluate_finished(out / "subjects" / "rex", models, family, Protocol(class_images=1))
    after = models.denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert found == json.loads((out / "subjects" / "rex" / "evaluation.json").read_text())


def test_another_base_is_refused(out):
    models = load_models(FAMILIES["sd"], small_config("model.path=embedded").model)
    with pytest.raises(protocol.DataError, match="was trained from another base"):
        evaluate_finished(out / "subjects" / "rex", models, FAMILIES["sd"], Protocol())


def test_a_subject_that_fails_is_named_and_the_others_are_scored(out):
    adapter = out / "subjects" / "ann" / "pytorch_lora_weights.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:100])
    result = run("evaluate", out, "--class-images", "1")
    assert result.exit_code == 3
    assert "error: ann: " in result.stderr and "has 100 bytes, record.json says" in result.stderr
    table = json.loads((out / "evaluation.json").read_text())
    assert table["subjects"] == 2 and list(table["failed"]) == ["ann"]


DAMAGE = {
    "record cut": ("record.json", lambda text: text[:40]),
    "record empty": ("record.json", lambda text: "{}"),
    "record of other kinds": ("record.json", lambda text: text.replace('"files": {', '"files": [], "more": {')),
    "settings cut": ("config.yaml", lambda text: text[:50] + "\n]"),
    "base gone": ("config.yaml", lambda text: re.sub(r"path: .*", "path: /nowhere/base", text)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_of_a_subject_are_its_own_failure(out, name):
    file, change = DAMAGE[name]
    path = out / "subjects" / "ann" / file  # ann is the first
    path.write_text(change(path.read_text()))
    result = run("evaluate", out, "--class-images", "1", "--quiet")
    assert result.exit_code == 3 and "error: ann: " in result.stderr and "Traceback" not in result.output, result.output
    table = json.loads((out / "evaluation.json").read_text())
    assert table["subjects"] == 2 and list(table["failed"]) == ["ann"]
    drawn = run("generate", out / "subjects" / "ann")
    assert drawn.exit_code in (2, 3) and isinstance(drawn.exception, SystemExit), drawn.output


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("--protocol", "paper"), 2, "--protocol: got 'paper', want dreambooth or quick"),
        (("--subject", "rax"), 3, "has no finished subject rax"),
        (("sample.step=3",), 2, "did you mean sample.steps"),
        (("--identity", "nowhere/vit"), 2, "nowhere/vit: no readable preprocessor_config.json"),
        (("--distance", "l2"), 2, "--distance: got 'l2', want auto, lpips, dreamsim, patches"),
        (("--distance", "dreamsim"), 2, "--distance: dreamsim does not work here (ModuleNotFoundError"),
        (("--shards", "nowhere"), 3, "nowhere: holds no photos of 'ann'"),
    ],
)
def test_wrong_words_say_what_to_do(out, words, code, message):
    result = run("evaluate", out, *words, "--quiet")
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.output


def test_a_folder_without_subjects_is_3(tmp_path):
    result = run("evaluate", tmp_path)
    assert (result.exit_code, "holds no finished subject" in result.stderr) == (3, True)


def test_encoders_of_the_true_sizes_from_a_folder(out, true_sizes):
    result = run(
        "evaluate",
        out / "subjects" / "rex",
        "--class-images",
        "1",
        "--images",
        "1",
        "--json",
        "--quiet",
        "--identity",
        true_sizes / "vit",
        "--clip",
        true_sizes / "clip",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["encoders"] == {
        "identity": str(true_sizes / "vit"),
        "clip": str(true_sizes / "clip"),
        "distance": f"patch distance of {true_sizes / 'vit'}",
    }
    assert load_identity(str(true_sizes / "vit")).model.config.hidden_size == 384
    cells = [cell["value"] for row in ("scores", "base", "real") for cell in found["macro"][row].values()]
    assert len(cells) >= 8 and all(math.isfinite(value) and -1 <= value <= 1 for value in cells)


def test_a_fully_tuned_subject_is_scored_by_its_own_model(tmp_path):
    from tests.kit.main_job import write_job

    words = write_job(
        tmp_path, "train.method=full", "train.steps=1", "prior.weight=0", "publish.dtype=fp32", subjects="rex:dog"
    )
    assert run("train", *words, "--subject", "rex", "--out", tmp_path / "out", "--quiet").exit_code == 0
    result = run("evaluate", tmp_path / "out", "--class-images", "1", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "subjects" / "rex"
    own, base = (next((folder / "evaluation").glob(f"{row}-a-photo*.png")) for row in ("class", "base-class"))
    assert Image.open(own).tobytes() != Image.open(base).tobytes()
    assert Path(folder / "model").is_dir()
