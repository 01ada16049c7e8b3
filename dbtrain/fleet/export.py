"""A run's subjects as a table for other programs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from dbtrain.errors import ConfigError, DataError
from dbtrain.fleet.status import read_rows
from dbtrain.storage.atomic import write_file


def write_rows(out: Path, path: Path) -> int:
    """Number of rows written to a .parquet or .csv file; nested values are JSON text in both."""
    if path.suffix not in WRITERS:
        raise ConfigError(f"--to {path}: ends in {path.suffix or 'nothing'}, want {' or '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--to {path}: its folder does not exist; make it, or name another")
    rows = [
        {key: json.dumps(value, sort_keys=True) if isinstance(value, dict) else value for key, value in row.items()}
        for row in read_rows(out)
    ]
    if not rows:
        raise DataError(f"{out}: its run has no subjects yet; `dbtrain batch run` did not get past its checks")
    write_file(path, WRITERS[path.suffix](rows))
    return len(rows)


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    numbers = {"attempts": pyarrow.int64(), "seconds": pyarrow.float64(), "gpu_seconds": pyarrow.float64()}
    schema = pyarrow.schema([(name, numbers.get(name, pyarrow.string())) for name in rows[0]])
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), sink)
    return sink.getvalue()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


WRITERS = {".parquet": _parquet, ".csv": _csv}
