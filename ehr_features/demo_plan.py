"""What to generate, and two small functions that the generator's parts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from ehr_features.demo_truth import Array


@dataclass(frozen=True)
class Plan:
    """What to generate.

    Args:
        subjects: number of subjects; about three quarters have an ICU stay.
        film_size: the longer side of a film, in pixels.
        shuffled: permute findings, ICD codes and death across subjects.
        risk: `level`: death follows what the last film before 48 h shows; `change`: only the change between films.
        view_shortcut: 0 to 1; outside the ICU an abnormal film is AP with probability (1 + this) / 2, a normal one with
            (1 - this) / 2. At 0 the view says nothing there.
        ed_text: 0 to 1; probability that the chief complaint is about what the visit's film shows.
    """

    subjects: int = 800
    seed: int = 0
    film_size: int = 128
    shuffled: bool = False
    risk: Literal["level", "change"] = "level"
    view_shortcut: float = 0.0
    ed_text: float = 0.0


def hours_between(later: pd.Series, earlier: pd.Series) -> Array:
    """Hours from `earlier` to `later`; NaN where either is missing."""
    return (later - earlier).dt.total_seconds().to_numpy() / 3600


def age_and_sex(table: pd.DataFrame) -> tuple[Array, Array]:
    """Age as (years - 65) / 15, and 1 for male."""
    return (table["age"].to_numpy(float) - 65) / 15, table["male"].to_numpy(float)
