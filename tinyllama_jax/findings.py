"""What was looked at and how it was found: the lines of doctor and audit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

_MARKS = {"ok": " ok ", "warning": "WARN", "problem": "FAIL"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      subject: what it is about, in one or two words.
      text: what was found, and what to do where something is wrong.
      level: "ok", "warning" (worth a look) or "problem" (wrong, or in vain).
    """

    subject: str
    text: str
    level: str = "ok"


def show(findings: Sequence[Finding]) -> int:
    """Prints a line for each and one for all; returns how many are problems."""
    for finding in findings:
        print(f"[{_MARKS[finding.level]}] {finding.subject}: {finding.text}")
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"\nproblems: {problems}, warnings: {warnings}")
    return problems
