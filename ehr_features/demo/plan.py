"""The generator's parameters and command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # `--help` does not import pandas
    import pandas as pd

    from ehr_features.demo.truth import Array


@dataclass(frozen=True)
class Plan:
    """What to generate.

    Args:
        subjects: number of subjects; about three quarters have an ICU stay.
        film_size: the longer side of a film, in pixels.
        shuffled: permute findings, ICD codes and death across subjects.
        risk: `level`: risk of death depends on the last film before 48 h; `change`: only on the change between films.
        view_shortcut: 0 to 1; above 0 frontal films have a strip of boxes, one per finding, as if burnt in by the
            machine. On AP films a box is white with probability (1 + this) / 2 if its finding is present and (1 - this)
            / 2 otherwise, else black; on PA films the probabilities are swapped. A probe trained on AP films learns the
            boxes and is misled by them on PA films.
        ed_text: 0 to 1; probability that the chief complaint is about what the visit's film shows.
        text_signal: 0 or more; how strongly frailty, visible only in complaints and home drugs, affects death, Fracture
            and Pneumonia.
        leak: 0 to 1; probability that the complaint names a finding that the visit's film shows.
        record_link: 0 or more; how strongly values of the record before a film (natriuretic peptide, white cells,
            saturation, ...) follow what it shows, as a share of the published strengths of record_link.py. 0 plants
            nothing; films and outcomes are the same for every value.
    """

    subjects: int = 800
    seed: int = 0
    film_size: int = 128
    shuffled: bool = False
    risk: Literal["level", "change"] = "level"
    view_shortcut: float = 0.0
    ed_text: float = 0.0
    text_signal: float = 0.0
    leak: float = 0.0
    record_link: float = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `ehr-msn hospital`."""
    parser.usage = "%(prog)s [options] OUT"
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--subjects", type=int, default=Plan.subjects, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=Plan.seed, metavar="S", help="default %(default)s")
    parser.add_argument(
        "--film-size", type=int, default=Plan.film_size, metavar="PX", help="longer side; default %(default)s"
    )
    parser.add_argument(
        "--shuffled", action="store_true", help="permute findings, ICD codes and death: nothing can be learned"
    )
    parser.add_argument(
        "--risk", choices=("level", "change"), default=Plan.risk, help="which part of the films carries risk of death"
    )
    parser.add_argument(
        "--view-shortcut",
        type=float,
        default=Plan.view_shortcut,
        metavar="P",
        help="0 to 1: boxes in AP films mark findings; in PA films the opposite",
    )
    parser.add_argument(
        "--ed-text", type=float, default=Plan.ed_text, metavar="P", help="0 to 1: complaints depend on the film"
    )
    parser.add_argument(
        "--text-signal",
        type=float,
        default=Plan.text_signal,
        metavar="S",
        help="notes have information that films lack; 1 is strong",
    )
    parser.add_argument("--leak", type=float, default=Plan.leak, metavar="P", help="0 to 1: complaints name findings")
    parser.add_argument(
        "--record-link",
        type=float,
        default=Plan.record_link,
        metavar="P",
        help="laboratory values, saturation and ventilation before a film follow what it "
        "shows, at this share of published strength: 0 (none) to 2; default %(default)s",
    )


def hours_between(later: pd.Series, earlier: pd.Series) -> Array:
    """Hours from `earlier` to `later`; NaN where either is missing."""
    return (later - earlier).dt.total_seconds().to_numpy() / 3600


def age_and_sex(table: pd.DataFrame) -> tuple[Array, Array]:
    """Age as (years - 65) / 15, and 1 for male."""
    return (table["age"].to_numpy(float) - 65) / 15, table["male"].to_numpy(float)
