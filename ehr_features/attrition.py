"""What fell out, and why: the content of attrition.json. Counts and ids, never a patient's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LISTED = 20  # ids named with each exclusion


class Attrition:
    """A list of exclusions, each with rows before and after, and of notes that excluded nothing."""

    def __init__(self) -> None:
        self.exclusions: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []

    def add(self, table: str, why: str, before: int, after: int, ids: Sequence[Any] = ()) -> None:
        """One exclusion; the ids of what fell out where something impossible is in them."""
        record: dict[str, Any] = {"table": table, "why": why, "before": int(before), "after": int(after)}
        if len(ids):
            record |= {"num_ids": len(ids), "ids": [_plain(i) for i in ids[:LISTED]]}
        self.exclusions.append(record)

    def note(self, what: str, count: int) -> None:
        """Something to know of that excluded no row."""
        self.notes.append({"what": what, "count": int(count)})

    def as_json(self) -> dict[str, Any]:
        """The content of attrition.json."""
        return {"exclusions": self.exclusions, "notes": self.notes}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
