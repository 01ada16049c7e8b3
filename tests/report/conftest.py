"""What the report's tests share: a small run, and what a build has made of it."""

import re

import pytest

from tests.kit.made_up_run import make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", 5, sheets=("step-000100", "samples"), photos=2, pool=8)


def page(run, subject):
    return (run / "report" / "subjects" / subject / "index.html").read_text("utf-8")


def tree(folder):
    """Every file with its content, but for the hour of the build."""
    return {
        path.relative_to(folder).as_posix(): re.sub(rb"2\d{3}-[\d-]+T?[ \d:]+(Z| UTC)", b"", path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
