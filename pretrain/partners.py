"""Which film is the target of another: `films.positives: study | patient`."""

from __future__ import annotations

import numpy as np
import pandas as pd


class Partners:
    """For each film another of the same study, or of the same subject within some days; itself where there is none.

    The other is of the same split, whatever the table says of its subject.
    """

    def __init__(self, table: pd.DataFrame, by: str, max_days: float | None) -> None:
        columns = ["split", "subject_id", *(["study_id"] if by == "study" else [])]
        codes = table.groupby(columns, sort=False, dropna=False).ngroup().to_numpy()
        self.order = np.argsort(codes, kind="stable")
        self.start = np.searchsorted(codes[self.order], codes, "left")
        self.end = np.searchsorted(codes[self.order], codes, "right")
        taken = pd.to_datetime(table["taken_at"])
        self.days = ((taken - taken.min()) / pd.Timedelta(days=1)).to_numpy(np.float64)
        self.max_days = max_days

    def __call__(self, rows: np.ndarray, u: np.ndarray) -> np.ndarray:
        """rows (B,) -> partners (B,), drawn by u (B,) in [0, 1)."""
        return np.array([self._one(int(row), x) for row, x in zip(rows, u, strict=True)])

    def count(self) -> int:
        """Films that have another."""
        return sum(len(self._others(row)) > 0 for row in range(len(self.order)))

    def _others(self, row: int) -> np.ndarray:
        others = self.order[self.start[row] : self.end[row]]
        others = others[others != row]
        if self.max_days is not None:
            others = others[np.abs(self.days[others] - self.days[row]) <= self.max_days]
        return others

    def _one(self, row: int, u: float) -> int:
        others = self._others(row)
        return int(others[int(u * len(others))]) if len(others) else row
