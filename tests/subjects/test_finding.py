"""Findings as lines, and as one error."""

import pytest

from dbtrain.errors import DataError
from dbtrain.subjects.finding import Finding, refuse

OF_A_SUBJECT = Finding("rex", "a.jpg", "is empty", "copy it again")
OF_A_ROW = Finding("", "m.csv:4", "column subject: got 'a b'", "correct the id")


def test_a_finding_is_a_line_with_its_subject_where_there_is_one():
    assert OF_A_SUBJECT.line() == "a.jpg: subject rex: is empty; copy it again"
    assert OF_A_ROW.line() == "m.csv:4: column subject: got 'a b'; correct the id"


def test_all_findings_are_one_error_and_none_is_none():
    refuse([])
    with pytest.raises(DataError) as caught:
        refuse([OF_A_SUBJECT, OF_A_ROW])
    assert str(caught.value).splitlines() == [OF_A_SUBJECT.line(), OF_A_ROW.line()]
