"""Results of the checks (subject, finding, and how to fix it if necessary), and the table of all results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from homodistil.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """A row of the table."""

    subject: str
    found: str
    fix: str | None = None
    """How to fix the problem; None if nothing is wrong."""

    @property
    def is_good(self) -> bool:
        return self.fix is None


class Findings(list[Finding]):
    """The rows in the order of the checks. Problems are collected here, not raised."""

    def note(self, subject: str, found: str) -> None:
        self.append(Finding(subject, found))

    def refuse(self, subject: str, found: str, fix: str) -> None:
        self.append(Finding(subject, found, fix))

    def attempt(self, subject: str, action: Callable[[], T]) -> T | None:
        """The result of `action`; None if it raised a `UserError`, which becomes a row."""
        try:
            return action()
        except UserError as error:
            self.append(refusal(subject, error))
            return None

    @property
    def are_good(self) -> bool:
        return all(finding.is_good for finding in self)


def refusal(subject: str, error: BaseException) -> Finding:
    """The row of an error. The text after the last semicolon of its message says how to fix the problem before it."""
    found, _, fix = str(error).rpartition("; ")
    return Finding(subject, found or fix, fix)


def merged(of_ranks: list[list[Finding]]) -> Findings:
    """Merge the findings of all ranks: one row for equal findings; for problems, the ranks are named.

    Args:
        of_ranks: the findings by rank; a rank that did not check a subject has no row for it.
    """
    subjects = list(dict.fromkeys(finding.subject for findings in of_ranks for finding in findings))
    rows = Findings()
    for subject in subjects:
        ranks_of: dict[Finding, list[int]] = {}
        for rank, findings in enumerate(of_ranks):
            for finding in findings:
                if finding.subject == subject:
                    ranks_of.setdefault(finding, []).append(rank)
        if all(finding.is_good for finding in ranks_of):
            first = min(ranks[0] for ranks in ranks_of.values())
            rows.extend(finding for finding, ranks in ranks_of.items() if ranks[0] == first)
        else:
            rows.extend(_named(finding, ranks) if len(of_ranks) > 1 else finding for finding, ranks in ranks_of.items())
    return rows


def _named(finding: Finding, ranks: list[int]) -> Finding:
    word = "rank" if len(ranks) == 1 else "ranks"
    return Finding(finding.subject, f"{word} {_ranges(ranks)}: {finding.found}", finding.fix)


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ", ".join(parts)


def format_findings(findings: Findings) -> str:
    """The table as text: one line per finding with subject, verdict and result; below each problem its fix."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.subject:{width}}  {'ok ' if finding.is_good else 'BAD'}  {finding.found}")
        if not finding.is_good:
            lines.append(f"{'':{width}}       fix: {finding.fix}")
    return "\n".join(lines)
