import gc
import weakref

from dbtrain.errors import ConfigError, DataError, EngineError, SubjectTaken, bare, first_line, summed


def test_many_failures_keep_the_exit_code_that_they_agree_on():
    assert (summed({"rex": DataError("torn")}).exit_code, str(summed({"rex": DataError("torn")}))) == (3, "rex: torn")
    assert summed({"rex": DataError("torn"), "tom": SubjectTaken("taken")}).exit_code == 3
    assert summed({"rex": ConfigError("a"), "tom": ConfigError(["b", "c"])}).exit_code == 2
    both = summed({"rex": DataError("torn"), "tom": EngineError("nan")})
    assert (type(both), str(both)) == (EngineError, "rex: torn\ntom: nan")


def test_an_error_is_told_in_one_line_whatever_it_says():
    assert first_line(ValueError("\n torn\nthen more")) == "torn"
    assert first_line(ValueError()) == "ValueError"


def test_a_kept_error_keeps_nothing_of_where_it_arose():
    class Model:
        pass

    def fail():
        model = Model()
        seen.append(weakref.ref(model))
        try:
            raise OSError(5, "no more")
        except OSError as error:
            raise DataError("torn") from error

    seen, kept = [], None
    try:
        fail()
    except DataError as error:
        kept = bare(error)
    gc.collect()
    assert str(kept) == "torn" and seen[0]() is None
