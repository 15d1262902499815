"""What the audit says of a claim."""

from __future__ import annotations

from dataclasses import dataclass

PROVED, REFUTED, UNKNOWN = "proved", "refuted", "cannot be proved"


@dataclass(frozen=True)
class Verdict:
    """A claim, what became of it, and the counts that say so."""

    claim: str
    outcome: str
    counts: str


def decide(claim: str, bad: dict[str, int], proof: str) -> Verdict:
    """Refuted if anything bad was counted, else proved.

    Args:
        bad: what would refute the claim -> how often it was found. proof: what was looked at, with counts.
    """
    found = [f"{n} {what}" for what, n in bad.items() if n]
    return Verdict(claim, REFUTED if found else PROVED, f"{'; '.join(found)} (of {proof})" if found else proof)


def cannot(claim: str, why: str) -> Verdict:
    """Not enough is there to tell."""
    return Verdict(claim, UNKNOWN, why)
