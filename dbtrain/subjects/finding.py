"""Defects of a manifest and its photos, in a form for a table, for JSON and for a line of text."""

from collections.abc import Iterable
from dataclasses import dataclass

from dbtrain.errors import DataError


@dataclass(frozen=True)
class Finding:
    """One defect: the subject's id, the photo or `manifest:line` it is in, what is wrong, and what to do about it.

    subject: empty where the row has no sound id, and where the finding is on the manifest as a whole.
    note: worth saying, but no defect: the subject is trained all the same.
    """

    subject: str
    file: str
    what: str
    remedy: str
    note: bool = False

    def line(self) -> str:
        """The finding as one line of text."""
        return f"{self.file}: {f'subject {self.subject}: ' if self.subject else ''}{self.what}; {self.remedy}"


class CellError(Exception):
    """A defect of one cell of a manifest: (what, want, remedy)."""


def defects(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are no notes."""
    return [finding for finding in findings if not finding.note]


def notes(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are notes."""
    return [finding for finding in findings if finding.note]


def refuse(findings: Iterable[Finding]) -> None:
    """Raise one DataError that names all defects, a line each; do nothing where there are none but notes."""
    if wrong := defects(findings):
        raise DataError("\n".join(finding.line() for finding in wrong))
