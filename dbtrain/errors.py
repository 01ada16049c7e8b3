"""Errors that a user can act on. Each says what is wrong, where, what was got, what was wanted, what to do."""

from collections.abc import Mapping


class DbtrainError(Exception):
    """A failure with a message meant for the user; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(DbtrainError):
    """One or more settings are wrong; `findings` holds a line for each of them."""

    exit_code = 2

    def __init__(self, findings: list[str] | str):
        self.findings = [findings] if isinstance(findings, str) else list(findings)
        super().__init__("\n".join(self.findings))


class DataError(DbtrainError):
    """A manifest, photo, shard or artefact is missing, damaged or not what was expected."""

    exit_code = 3


class SubjectTaken(DataError):
    """Another process trains the subject, or trained it and is not yet known to be dead."""


class EngineError(DbtrainError):
    """Training cannot go on: a non-finite loss, an impossible engine choice, too little memory."""

    exit_code = 4


class FleetError(DbtrainError):
    """The cluster or one of its workers failed in a way that a retry alone does not repair."""

    exit_code = 5


class StopRequested(EngineError):
    """SIGTERM, SIGUSR1 or a first Ctrl-C came. Finished work is kept, and the same command run again goes on."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class if the text is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


NAMED = 8
"""Most subjects that a message names one by one."""


def reached(steps: Mapping[str, int]) -> str:
    """Where subjects stand that go on later, in brackets: the steps made, by id; empty for none."""
    told = [f"{name} after step {step}" for name, step in list(steps.items())[:NAMED]]
    more = [f"and {len(steps) - NAMED} more"] if len(steps) > NAMED else []
    return f" ({', '.join([*told, *more])})" if told else ""


def summed(failed: Mapping[str, DbtrainError]) -> DbtrainError:
    """One error with a line for every subject that failed. It keeps their exit code if they all have the same."""
    first, *others = failed.values()
    kind = type(first) if all(other.exit_code == first.exit_code for other in others) else EngineError
    return kind("\n".join(f"{name}: {error}" for name, error in failed.items()))


WIDTH = 80
"""Longest excerpt of a bad value that is shown."""


def named(path: object) -> str:
    """A path as one printable line; one of plain characters stays as it is."""
    text = str(path)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def shown(value: object) -> str:
    """A value as a short printable excerpt on one line, safe for a terminal."""
    text = ascii(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
