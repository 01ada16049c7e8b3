"""`dbtrain evaluate`: its words are checked before anything is loaded. The scores are tested in tests/evaluate."""

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.verbs.evaluation import nouns


def test_nouns_are_a_list_with_commas_whatever_their_case_and_spaces():
    assert nouns(" Gnome, garden  imp,,DUCK ") == {"gnome", "garden imp", "duck"}
    assert nouns("") == frozenset()


@pytest.mark.parametrize("words, code, message", [
    (["--protocol", "slow"], 2, "--protocol: got 'slow', want dreambooth or quick"),
    (["--images", "0"], 2, "Invalid value for '--images'"),
    ([], 3, "none"),
])  # fmt: skip
def test_wrong_words_are_refused(tmp_path, words, code, message):
    result = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "none"), *words])
    assert (result.exit_code, message in result.stderr) == (code, True), result.output
