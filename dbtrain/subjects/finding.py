"""What is wrong with some input, in a form for a table, for JSON and for one line of text."""

from collections.abc import Sequence
from dataclasses import dataclass

from dbtrain.errors import DataError


@dataclass(frozen=True)
class Finding:
    """One defect of the input: whose, where (a photo, or `manifest:row`), what is wrong, what to do about it."""

    subject: str
    file: str
    what: str
    remedy: str

    def line(self) -> str:
        """The finding as one line of text."""
        return f"{self.file}: {f'subject {self.subject}: ' if self.subject else ''}{self.what}; {self.remedy}"


class CellError(Exception):
    """A defect of one cell of a manifest: (what, want, remedy)."""


def refuse(findings: Sequence[Finding]) -> None:
    """Raise one DataError that names all findings, a line each; do nothing where there are none."""
    if findings:
        raise DataError("\n".join(finding.line() for finding in findings))
