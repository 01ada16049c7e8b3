"""A run's subjects as a table for other programs."""

import pyarrow.parquet
import pytest

from dbtrain.errors import ConfigError
from dbtrain.fleet.export import write_rows
from tests.kit.fleet_run import RESULT


def test_a_table_has_a_row_for_each_subject(ledger, tmp_path):
    with ledger.commit():
        ledger.start(1, [0], "w1")
        ledger.finish(0, 1, RESULT)
    assert write_rows(tmp_path, tmp_path / "t.csv") == write_rows(tmp_path, tmp_path / "t.parquet") == 6
    rows = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert (rows[0]["subject"], rows[0]["gpu_seconds"], rows[0]["stages_s"]) == ("s0", 3.0, '{"train": 2.0}')
    assert (tmp_path / "t.csv").read_text().splitlines()[6].startswith("bad,,skipped,no photo")
    with pytest.raises(ConfigError, match="ends in .txt, want .parquet or .csv"):
        write_rows(tmp_path, tmp_path / "t.txt")
