import errno
import gc
import weakref

import pytest

from dbtrain.errors import DataError
from dbtrain.storage.trouble import DISK_REMEDIES, bare, disk_trouble


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
    assert (kept.__cause__.errno, kept.__cause__.__traceback__, kept.__context__) == (5, None, None)


class Rust(Exception):
    """What safetensors raises."""


@pytest.mark.parametrize("error", [
    OSError(errno.ESTALE, "Stale file handle", "/data/a.tar"), OSError(errno.EIO, "Input/output error"),
    Rust("I/O error: Stale file handle (os error 116)"), ValueError("no photo"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/a.tar"), None,
])  # fmt: skip
def test_a_kept_error_is_judged_as_before(error):
    """Solo keeps a failed subject's error while it trains the others; the fleet asks it later who is to blame."""
    kept = DataError("shard a.tar: torn")
    kept.__cause__ = error
    before = [disk_trouble(kept, paths) for paths in (True, False)]
    assert [disk_trouble(bare(kept), paths) for paths in (True, False)] == before


@pytest.mark.parametrize("name", ["ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENODEV", "ENXIO", "EREMOTEIO",
                                  "ENFILE", "ENOLCK"])  # fmt: skip
def test_storage_that_is_gone_has_a_remedy(name):
    told = disk_trouble(OSError(getattr(errno, name), "x", "/data/a.tar"))
    assert told.startswith("/data/a.tar: ") and f"; {DISK_REMEDIES[name]}, then run the same command again" in told


def test_a_platform_without_an_errno_never_meets_it(monkeypatch):
    monkeypatch.setitem(DISK_REMEDIES, "ENOSUCHNUMBER", "nothing")
    assert disk_trouble(OSError(None, "x")) is None and disk_trouble(OSError(99999, "x", "a")) is None
