"""What a plan refuses before a launcher sees it, and the words that it hands on."""

import pytest

from dbtrain.errors import ConfigError
from dbtrain_launchers.plan import make_plan
from tests.kit.injections import ODD, TEXTS

TRAIN = ["train", "photos.csv"]


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a-", "x" * 64, *TEXTS])
def test_names_of_jobs_are_plain(name):
    with pytest.raises(ConfigError, match="--name"):
        make_plan(TRAIN, name=name)


def test_an_error_lists_all_findings_at_once():
    with pytest.raises(ConfigError) as error:
        make_plan(["generate"], ["A", "API_KEY=x", "B\n=x"], nodes=0, gpus=-1, name="A")
    assert len(error.value.findings) == 7


def test_odd_words_are_words():
    assert make_plan([*TRAIN, *ODD]).words == (*TRAIN, *ODD)


def test_a_fleet_uses_the_launchers_cluster_unless_its_words_name_another():
    assert make_plan(["batch", "run", "m.csv"]).cluster_words == ("batch", "run", "--address", "auto", "m.csv")
    given = ("batch", "run", "m.csv", "--address=ray://other")
    assert make_plan(given).cluster_words == given
