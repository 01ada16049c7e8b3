"""The doctor finds what it says it finds, and its report is data."""

import json
import shutil
import socket

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.families import FAMILIES
from dbtrain.verbs import doctor


@pytest.mark.slow
def test_this_machine_is_examined_as_data(tmp_path):
    told = CliRunner().invoke(cli.app, ["doctor", "--json", "--model", str(tmp_path / "absent model")])
    rows = json.loads(told.stdout)
    assert told.exit_code == 1  # a failure stops, whatever else is only warned of
    assert {"python", "gpu", "engine", "compiler", "disk", "memory", "torchvision", "xformers", "launcher", "hub"} <= {
        row["name"] for row in rows
    }
    assert {row["state"] for row in rows} <= {"ok", "warn", "fail"}
    assert rows[-1]["state"] == "fail"
    assert all(row["remedy"] for row in rows if row["state"] == "fail")


@pytest.mark.parametrize(
    "broken, state, detail",
    [
        ("import xformers.ops", "fail", "no model loads"),
        (".cuda()", "warn", "does not load: no"),
        ("", "ok", "1"),
    ],
)
def test_an_xformers_that_does_not_load_stops_every_run(broken, state, detail, monkeypatch):
    """One whose operators cannot run here, as on a CPU, only keeps that attention from being chosen."""
    monkeypatch.setattr(doctor, "installed", lambda name: "0.0.35.1")
    check = doctor.check_xformers(lambda code: (not broken or broken not in code, "no"))
    assert (check.state, bool(check.remedy)) == (state, state != "ok") and detail in check.detail


@pytest.mark.parametrize("state, engine", [("ok", "packed: a LoRA"), ("warn", "zero: one process on a CPU")])
def test_the_engine_that_auto_is_here_is_told(state, engine):
    check = doctor.check_engine(doctor.Check(state, "gpu", "one"))
    assert (check.state, check.name) == ("ok", "engine") and f"engine.kind: auto is {engine}" in check.detail


@pytest.mark.parametrize(
    ("version", "state"),
    [(None, "fail"), ("2.9.1", "fail"), ("2.10.0", "ok"), ("2.13.0+cpu", "ok"), ("2.14.0rc1", "ok")],
)
def test_versions_are_compared_with_what_setup_asks_for(version, state):
    check = doctor.check_requirement(Requirement("torch>=2.10"), version)
    assert check.state == state
    assert (check.remedy != "") == (state == "fail")


def test_requirements_of_extras_are_left_out(monkeypatch):
    lines = ["torch>=2.10", "xformers>=0.0.35; extra == 'gpu'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    assert [entry.name for entry in doctor.required()] == ["torch"]


def test_a_checkout_that_was_never_installed_says_so(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert [(check.name, check.state) for check in doctor.check_requirements()] == [("packages", "warn")]


def test_a_probe_reports_what_went_wrong():
    assert doctor.probe("print('one'); print('two')") == (True, "two")
    assert doctor.probe("raise SystemExit('no libcudart')") == (False, "no libcudart")


def test_a_probe_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_S", 0.2)
    assert doctor.probe("import time; time.sleep(60)") == (False, "not finished after 0.2 s")


@pytest.mark.parametrize(
    ("line", "state", "part"),
    [
        ((True, "1|2.13.0|13.0|H100, 80 GiB"), "ok", "H100"),
        ((True, "0|2.13.0|13.0|"), "warn", "CUDA 13.0"),
        ((True, "0|2.13.0+cpu|None|"), "warn", "built for the CPU"),
        ((False, "ImportError: x"), "fail", "ImportError: x"),
    ],
)
def test_gpu_states(monkeypatch, line, state, part):
    monkeypatch.setattr(doctor, "probe", lambda code: line)
    check = doctor.check_gpu()
    assert check.state == state
    assert part in check.detail


@pytest.mark.parametrize(("free_gib", "state"), [(1, "warn"), (500, "ok")])
def test_disk(monkeypatch, tmp_path, free_gib, state):
    usage = type("Usage", (), {"free": free_gib * 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.check_disk(tmp_path).state == state


@pytest.mark.parametrize(
    ("text", "state"), [("MemAvailable:   1048576 kB\n", "warn"), ("MemAvailable: 99999999 kB\n", "ok"), ("", "ok")]
)
def test_memory(tmp_path, text, state):
    (tmp_path / "meminfo").write_text(text)
    assert doctor.check_memory(tmp_path / "meminfo").state == state


@pytest.mark.parametrize(("found", "state"), [("/bin/tool", "ok"), (None, "warn")])
def test_compiler(monkeypatch, found, state):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: found)
    assert doctor.check_compiler().state == state


@pytest.mark.parametrize("name", doctor.OPTIONAL)
def test_a_broken_optional_package_is_a_finding(monkeypatch, name):
    code, absent, remedy = doctor.OPTIONAL[name]
    monkeypatch.setattr(doctor, "installed", lambda name: "0.28.0")
    check = doctor.check_optional(name, lambda asked: (asked != code, "operator missing"))
    assert (check.state, check.remedy) == ("warn", remedy)
    assert doctor.check_optional(name, lambda asked: (asked == code, "")).state == "ok"
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert (doctor.check_optional(name).state, doctor.check_optional(name).detail) == ("ok", absent)


def test_a_package_that_hides_hugging_faces_kernels_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernels").mkdir()
    assert doctor.check_kernels_package().state == "ok"
    (tmp_path / "kernels" / "__init__.py").touch()
    assert doctor.check_kernels_package().state == "fail"


@pytest.mark.parametrize(
    ("address", "answer", "state"),
    [
        ("127.0.0.1:6379", (True, ""), "ok"),
        ("[::1]:6379", (True, ""), "ok"),
        ("10.0.0.7:6379", (True, ""), "fail"),
        ("0.0.0.0:6379", (True, ""), "fail"),
        ("10.0.0.7:6379", (False, "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken"), "ok"),
        ("10.0.0.7:6379", (False, "not finished after 120 s"), "warn"),
    ],
)
def test_a_ray_head_that_others_reach_needs_a_token(address, answer, state):
    """What a stranger is told by real heads is in tests/security/test_cluster.py."""
    assert doctor.check_ray_head(address, lambda code: answer).state == state


def test_a_token_that_others_may_read_is_a_failure(monkeypatch, tmp_path):
    path = tmp_path / "token"
    path.touch(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert [(check.state, check.remedy) for check in doctor.check_ray(tmp_path)] == [("fail", f"chmod 600 {path}")]
    path.chmod(0o600)
    assert doctor.check_ray(tmp_path) == []


def test_only_a_living_ray_head_counts(tmp_path):
    assert doctor.check_ray(tmp_path) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "ray_current_cluster").write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert [check.state for check in doctor.check_ray(tmp_path)] == ["ok"]
    assert doctor.check_ray(tmp_path) == []


def test_model_places(tmp_path):
    states = {"org/name": "warn", str(tmp_path / "no" / "such" / "folder"): "fail", str(tmp_path): "fail"}
    for name, state in (("weights.ckpt", "fail"), ("weights.safetensors", "fail")):
        (tmp_path / name).touch()
        states[str(tmp_path / name)] = state
    assert {model: doctor.check_model(model).state for model in states} == states
    (tmp_path / "model_index.json").touch()
    assert "cannot be read" in doctor.check_model(str(tmp_path)).detail


def test_a_model_is_looked_into(model_folders, tmp_path):
    for name in FAMILIES:
        folder = model_folders[name]
        check = doctor.check_model(str(folder))
        assert (check.state, check.detail) == ("ok", f"{folder}, model.family={name}")
    shutil.copytree(model_folders["sd"], tmp_path / "base")
    place = tmp_path / "base" / "unet" / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "in_channels": 9}))
    check = doctor.check_model(str(tmp_path / "base"))
    assert (check.state, "is an inpainting model" in check.detail) == ("fail", True), check


def test_a_base_is_told_with_its_recipe_and_its_cost(model_folders):
    """Ideogram 4 draws with a second transformer, and an upscaler is shown a small picture."""
    found = {check.name: check for check in doctor.check_base(str(model_folders["ideogram4"]))}
    assert [check.state for check in found.values()] == ["ok"] * 5
    assert found["model recipe"].detail.startswith("begin with --config ideogram4_lora model.path=")
    assert "GiB: transformer 0.0, unconditional_transformer 0.0, text_encoder" in found["model files"].detail
    assert "a LoRA step in bf16 at 1024 px" in found["model needs"].detail
    *_, cost = doctor.check_base(str(model_folders["x4_upscaler"]))
    assert (cost.state, cost.name) == ("ok", "model cost"), cost.detail
    assert [check.name for check in doctor.check_base("embedded")][:2] == ["model", "model files"]
