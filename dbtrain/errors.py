"""Errors that a user can act on. Each says what is wrong, where, what was got, what was wanted, what to do."""


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


class EngineError(DbtrainError):
    """Training cannot go on: a non-finite loss, an impossible engine choice, too little memory."""

    exit_code = 4


class FleetError(DbtrainError):
    """The cluster or one of its workers failed in a way that a retry by itself does not mend."""

    exit_code = 5
