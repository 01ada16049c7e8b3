"""What the verbs share: help with examples, the run's last command, and an end at once when asked to stop."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import typer
from typer.testing import CliRunner

from dbtrain.errors import StopRequested
from dbtrain.verbs.options import Verb, group, keep_origin

STOPPING = """
import time
from dbtrain.verbs.options import stop_at_once
stop_at_once()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_group_shows_the_examples_of_its_verbs_line_by_line():
    def draw(many: int = 1) -> None:
        """Draw a picture."""
        typer.echo("drawn")

    def erase() -> None:
        """Erase it."""

    app = group("About pictures.", "paint draw", {"draw": Verb(draw, "paint draw\npaint draw --many 2"),
                                                  "erase": Verb(erase, "paint erase")})  # fmt: skip
    assert "About pictures.\n\n  Example:\n    paint draw\n" in CliRunner().invoke(app, ["--help"]).stdout
    shown = CliRunner().invoke(app, ["draw", "--help"]).stdout
    assert "Draw a picture.\n\n  Example:\n    paint draw\n    paint draw --many 2\n" in shown
    assert CliRunner().invoke(app, ["draw"]).stdout == "drawn\n"


def test_the_last_command_of_a_run_is_kept_and_an_equal_one_is_not_written_again(tmp_path):
    words = ("train", Path("photos.csv"), "tiny")
    keep_origin(tmp_path, *words, ["seed=1"], False)
    first = (tmp_path / "run.json").stat()
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "verb": "train", "manifest": "photos.csv", "config": "tiny", "out": str(tmp_path), "overrides": ["seed=1"],
        "skip_bad": False}  # fmt: skip
    keep_origin(tmp_path, *words, ["seed=1"], False)
    assert (tmp_path / "run.json").stat().st_ino == first.st_ino
    keep_origin(tmp_path, *words, None, True)
    assert json.loads((tmp_path / "run.json").read_text())["overrides"] == []


def test_a_request_to_stop_ends_the_process_at_once_with_the_code_to_run_it_again():
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with subprocess.Popen([sys.executable, "-c", STOPPING], stdout=-1, stderr=-1, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            began = time.monotonic()
            process.send_signal(number)
            assert process.wait(timeout=30) == StopRequested.exit_code
            assert time.monotonic() - began < 20
            assert "run the same command to go on" in process.stderr.read()
