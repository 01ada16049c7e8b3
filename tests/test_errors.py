"""Errors that a user can act on: exit codes, and texts of one line."""

from dbtrain.errors import ConfigError, DataError, EngineError, SubjectTaken, first_line, summed


def test_many_failures_keep_the_exit_code_that_they_agree_on():
    assert (summed({"rex": DataError("torn")}).exit_code, str(summed({"rex": DataError("torn")}))) == (3, "rex: torn")
    assert summed({"rex": DataError("torn"), "tom": SubjectTaken("taken")}).exit_code == 3
    assert summed({"rex": ConfigError("a"), "tom": ConfigError(["b", "c"])}).exit_code == 2
    both = summed({"rex": DataError("torn"), "tom": EngineError("nan")})
    assert (type(both), str(both)) == (EngineError, "rex: torn\ntom: nan")


def test_an_error_is_told_in_one_line_whatever_it_says():
    assert first_line(ValueError("\n torn\nthen more")) == "torn"
    assert first_line(ValueError()) == "ValueError"
