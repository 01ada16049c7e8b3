"""One torch thread for the tests of the shipped models, as for those of their making."""

from tests.embedded.conftest import one_thread

__all__ = ["one_thread"]
