"""Defects of a manifest and its photos, in a form for a table, for JSON and for a line of text."""

from collections.abc import Sequence
from dataclasses import dataclass

from dbtrain.errors import DataError


@dataclass(frozen=True)
class Finding:
    """One defect: the subject's id, the photo or `manifest:line` it is in, what is wrong, and what to do about it.

    subject: empty where the row has no sound id.
    """

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
