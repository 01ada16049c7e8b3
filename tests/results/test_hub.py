"""`dbtrain push` to a hub on this machine, with huggingface_hub as it is."""

import huggingface_hub.constants as constants
import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.results.card import publish_card
from dbtrain.settings.recipes import loads
from tests.kit.model_hub import TOKEN, model_hub
from tests.kit.published import PUBLISHED, make_result

REPO = "someone/rex-lora"


@pytest.fixture
def result(tmp_path):
    folder = make_result(tmp_path / "rex", files=("weights.bin", "model/vae/a.bin"))
    publish_card(folder, PUBLISHED, loads("{}"), "{}")
    return folder


@pytest.fixture
def hub(monkeypatch):
    with model_hub() as (made, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub here speaks LFS
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def push(*words):
    return CliRunner().invoke(cli.app, ["push", *map(str, words)])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_result_is_pushed_whole_in_one_commit(result, hub):
    pushed = push(result, "--to", REPO)
    assert pushed.exit_code == 0, pushed.output
    assert {name: content for name, (_, content) in hub.repos[REPO].items()} == contents(result)
    assert hub.commits == 1 and hub.private[REPO] and f"/{REPO}/commit/" in pushed.stdout


def test_a_second_push_sends_nothing_and_a_changed_file_alone_is_sent(result, hub):
    push(result, "--to", REPO)
    hub.requests.clear()
    assert push(result, "--to", REPO).exit_code == 0 and hub.commits == 1
    assert not any(line.startswith("PUT") for line in hub.requests)
    make_result(result, run="3", files=("model/vae/a.bin",))
    hub.requests.clear()
    assert push(result, "--to", REPO).exit_code == 0 and hub.commits == 2
    assert hub.repos[REPO]["record.json"][1] == (result / "record.json").read_bytes()


def test_a_repository_is_public_only_where_that_was_asked_for(result, hub):
    assert push(result, "--to", REPO, "--public").exit_code == 0 and not hub.private[REPO]


@pytest.mark.parametrize("stage", [("POST", "create"), ("POST", "preupload"), ("POST", "batch"), ("PUT", "/lfs/"),
                                   ("POST", "/commit/")])  # fmt: skip
def test_a_push_that_is_refused_anywhere_leaves_nothing_and_is_done_again(result, hub, stage):
    hub.refuse = {stage: 403}
    refused = push(result, "--to", REPO)
    told = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert refused.exit_code == 3 and len(told) == 1 and told[0].startswith(f"error: {REPO}: "), refused.output
    assert TOKEN not in refused.output
    assert not hub.repos.get(REPO)
    hub.refuse = {}
    assert push(result, "--to", REPO).exit_code == 0 and len(hub.repos[REPO]) == len(contents(result))


def test_what_the_hub_keeps_differently_is_noticed(result, hub):
    hub.rot = True
    rotten = push(result, "--to", REPO)
    assert rotten.exit_code == 3 and "is not there as it was sent" in rotten.stderr


@pytest.mark.parametrize("word", ["rex", "https://hub/someone/rex", "someone/rex/lora", "-x/y"])
def test_what_is_no_repository_is_refused(result, word):
    assert "write USER/NAME" in push(result, f"--to={word}").stderr


def test_a_bad_token_is_told_with_what_to_do(result, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    refused = push(result, "--to", REPO)
    assert refused.exit_code == 3 and "hf auth login" in refused.stderr and "bbbb" not in refused.stderr


def test_offline_and_a_hub_that_is_not_there_are_told(result, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    gone = push(result, "--to", REPO)
    assert gone.exit_code == 3 and "http://127.0.0.1:9" in gone.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in push(result, "--to", REPO).stderr


def test_rot_and_unfinished_folders_are_not_pushed(result, hub, tmp_path):
    assert push(tmp_path / "none", "--to", REPO).exit_code == 3
    (result / "weights.bin").write_bytes(b"rot")
    assert "weights.bin: has 3 bytes" in push(result, "--to", REPO).stderr and hub.repos == {}
