"""A verdict of the audit: proved, refuted, or unknown."""

from __future__ import annotations

from dataclasses import dataclass

PROVED, REFUTED, UNKNOWN = "proved", "refuted", "cannot be proved"


@dataclass(frozen=True)
class Verdict:
    """A claim, its outcome, and the counts behind it."""

    claim: str
    outcome: str
    counts: str


def decide(claim: str, bad: dict[str, int], proof: str) -> Verdict:
    """Refuted if any count of violations is above 0, else proved.

    Args:
        bad: kind of violation -> its count. proof: what was compared, with counts.
    """
    found = [f"{n} {what}" for what, n in bad.items() if n]
    return Verdict(claim, REFUTED if found else PROVED, f"{'; '.join(found)} (of {proof})" if found else proof)


def cannot(claim: str, why: str) -> Verdict:
    """The verdict `cannot be proved`: a file that the claim needs is missing."""
    return Verdict(claim, UNKNOWN, why)
