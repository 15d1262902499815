"""Turn logits of films into rows of results.json: by study, by label, by subgroup.

A study's score is the mean of its films' probabilities. A gap is the difference of macro AUROC between two groups of a
field, over the labels that have both classes in both, with the interval of the same resamples of subjects. The largest
of several gaps overestimates the true gap, and its interval does not account for the selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.special import expit, logit

from configs import UserError
from ehr_features.schema import SPLITS
from finetune.labelled import Films, age_bands
from finetune.metrics import distribution, evaluate, macro
from finetune.resample import DIFFERENCE, Floats, degrees, smaller_class, spread
from finetune.results import write_predictions

if TYPE_CHECKING:
    from finetune.config import ProbeConfig


# ---- Messages of `probe`.


def plan(config: ProbeConfig, films: Films, name: str) -> str:
    """One line on what will be fitted."""
    counts = ", ".join(f"{len(films.rows(split)):,} {split}" for split in SPLITS)
    if config.folds:
        counts = f"{films.table['subject_id'].nunique():,} subjects in {config.folds} folds, {len(films):,}"
    left = "".join(f"; {number:,} left out ({why})" for why, number in films.left_out.items())
    return f"{config.method} probe of {name} on {len(films.names)} labels: {counts} films{left}"


def table(rows: pd.DataFrame, title: str) -> None:
    """The test split, all subjects, the largest fraction; then the macros of the other subsets and fractions."""
    grid = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("label", "AUROC", "95% interval", "AUPRC", "prevalence", "n", "positive"):
        grid.add_column(name, justify="left" if name == "label" else "right", no_wrap=name != "label")
    largest = rows["fraction"].max()
    whole: pd.DataFrame = rows[(rows["split"] == "test") & (rows["subset"] == "all") & (rows["fraction"] == largest)]
    for label in dict.fromkeys(whole["label"]):
        _row(grid, label, whole[whole["label"] == label])
    others = rows[(rows["label"] == "macro") & ~rows.index.isin(whole.index) & (rows["split"] != "val")]
    if len(others):
        grid.add_section()
    for (split, subset, fraction), part in others.groupby(["split", "subset", "fraction"], sort=False):
        words = ["macro"]
        words += [str(subset)] if subset != "all" else []
        words += [f"{fraction!s} of train subjects"] if fraction != largest else []
        words += [str(split)] if split != "test" else []
        _row(grid, ", ".join(words), part)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110  # width of a log file
    console.print(grid)


def _row(grid: Table, name: str, part: pd.DataFrame) -> None:
    by: dict[str, Any] = {str(row["metric"]): row for row in part.astype(object).to_dict("records")}
    auroc = by["auroc"]
    counts = (f"{auroc['n']:,}", f"{auroc['positives']:,}")
    if np.isnan(auroc["value"]):
        grid.add_row(Text(name), "-", str(auroc["reason"]).partition(":")[0], "", "", *counts)
        return
    interval = f"{auroc['low']:.3f} - {auroc['high']:.3f}" if not np.isnan(auroc["low"]) else "-"
    numbers = [f"{by[m]['value']:.3f}" for m in ("auprc", "prevalence")]
    grid.add_row(Text(name), f"{auroc['value']:.3f}", interval, *numbers, *counts)


def notes(more: Mapping[str, Any]) -> list[str]:
    """More lines for the screen: the chosen head, the largest gap between groups, the shift."""
    lines = []
    for fit in more.get("fractions", [])[-1:]:
        known = {k: v for k, v in fit.items() if k not in ("fraction", "draw", "films", "subjects")}
        lines.append("chosen on validation: " + ", ".join(f"{k} {_short(v)}" for k, v in known.items()))
    for gap in more.get("gaps", [])[:1]:
        lines.append(
            f"largest gap: {gap['field']} {gap['higher']} over {gap['lower']}, macro AUROC {gap['difference']:+.3f} "
            f"({gap['low']:+.3f} to {gap['high']:+.3f}; {gap['labels']} labels)"
        )
    if "shift" in more:
        lines.append("shift: " + more["shift"]["says"])
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


CHEXPERT5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
SMALLEST = 20  # groups with fewer studies are not compared
RACES = {"WHITE": "white", "PORTUGUESE": "white", "BLACK": "black", "HISPANIC": "hispanic", "ASIAN": "asian"}


@dataclass(frozen=True)
class Scored:
    """N studies (or films) with their predictions; `table` holds subject_id and one column per subgroup field."""

    table: pd.DataFrame
    labels: NDArray[np.float32]  # (N, L) 1, 0, NaN
    probabilities: NDArray[np.float64]  # (runs, N, L), or (N, L) of one run; NaN: a label that was not learned
    names: list[str]

    @property
    def runs(self) -> NDArray[np.float64]:
        """Probabilities as (runs, N, L)."""
        return self.probabilities.reshape(-1, *self.labels.shape)

    def write(self, folder: Path, split: str, run: int = 0) -> None:
        """Write a run's predictions, one row per study (named by its first film) or film."""
        ids = self.table[["dicom_id", "study_id", "subject_id", "view", "num_films"]]
        p = np.clip(self.runs[run], 1e-15, 1 - 1e-15)
        write_predictions(folder, split, ids, pd.DataFrame(self.labels, columns=self.names), logit(p))

    def only(self, rows: NDArray[np.bool_]) -> Scored:
        return Scored(
            self.table[rows].reset_index(drop=True), self.labels[rows], self.probabilities[..., rows, :], self.names
        )


def scored(films: Films, rows: NDArray[np.intp], logits: NDArray[np.float64], *, unit: str = "study") -> Scored:
    """Films of `rows` as studies or films; a study is positive if any of its films is.

    Args:
        logits: (len(rows), L), or (runs, len(rows), L).
    """
    table = films.table.iloc[rows].reset_index(drop=True)
    table = table.assign(**{f"by_{field}": values for field, values in fields(table).items()})
    labels, probabilities = films.evaluated(rows), expit(logits)
    table["num_films"] = table.groupby("study_id")["study_id"].transform("size") if unit == "study" else 1
    if unit == "study":
        key, first = pd.factorize(table["study_id"])[0], table.drop_duplicates("study_id").reset_index(drop=True)
        labels = pd.DataFrame(labels).groupby(key).max().to_numpy(np.float32)
        runs = probabilities.reshape(-1, len(rows), logits.shape[-1])
        means = np.stack([pd.DataFrame(run).groupby(key).mean().to_numpy() for run in runs])
        probabilities = means if logits.ndim == 3 else means[0]
        table = first
    return Scored(table, labels, probabilities, films.names)


def fields(table: pd.DataFrame) -> dict[str, pd.Series]:
    """The subgroup fields of these films; missing values belong to no group."""
    found: dict[str, pd.Series] = {}
    if "sex" in table:
        found["sex"] = table["sex"]
    if "age_years" in table:
        found["age"] = age_bands(table["age_years"]).astype(object)
    if "race" in table:
        names = table["race"].astype("string").str.upper()
        known = names.str.extract(f"({'|'.join(RACES)})")[0].map(RACES)
        found["race"] = known.where(known.notna() | names.isna(), "other")
    if "view" in table:
        found["view"] = table["view"]
    if "support_devices" in table:
        found["support_devices"] = table["support_devices"].map({True: "yes", False: "no"})
    if "care_unit" in table:
        found["care_unit"] = table["care_unit"]
    if "anchor_year_group" in table:
        found["year_group"] = table["anchor_year_group"]
    return {name: values.astype(object).where(values.notna(), None) for name, values in found.items()}


def check_fields(wanted: Sequence[str], table: pd.DataFrame) -> None:
    """Raises: UserError: a subgroup field that is absent from these films."""
    have = fields(table)
    if unknown := [field for field in wanted if field not in have]:
        raise UserError(f"subgroups: no field `{unknown[0]}` here; there are {', '.join(have) or 'none'}")


def macros(names: Sequence[str]) -> dict[str, list[str]]:
    """The means over subsets of labels that papers report."""
    found = {}
    if "No Finding" in names and len(names) > 2:
        found["macro without No Finding"] = [name for name in names if name != "No Finding"]
    if set(CHEXPERT5) <= set(names):
        found["macro CheXpert-5"] = list(CHEXPERT5)
    return found


def score(
    on: Scored,
    *,
    samples: int,
    seed: int,
    thresholds: NDArray[np.float64] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Rows of one split. `reasons`: why labels were not learned."""
    return evaluate(
        on.labels,
        on.probabilities,
        names=on.names,
        groups=on.table["subject_id"].to_numpy(),
        samples=samples,
        seed=seed,
        thresholds=thresholds,
        macros=macros(on.names),
        reasons=reasons,
    )


def subgroups(
    on: Scored, wanted: Sequence[str], *, samples: int, seed: int, **more: Any
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Rows for each group of each field (see `check_fields`; `more` as in `score`), and the gaps, the largest first."""
    tables: list[pd.DataFrame] = []
    gaps: list[dict[str, Any]] = []
    for field in wanted:
        values = on.table[f"by_{field}"]
        groups = {str(value): on.only((values == value).to_numpy(dtype=bool)) for value in sorted(set(values.dropna()))}
        for value, part in groups.items():
            rows = score(part, samples=samples, seed=seed, **more)
            tables.append(rows.assign(subset=f"{field}={value}"))
        gaps += _gaps(on, field, samples, seed)
    gaps.sort(key=lambda gap: float(str(gap["difference"])), reverse=True)
    return (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()), gaps


def _gaps(on: Scored, field: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """The largest gap of a field, in a list; empty if no two groups can be compared."""
    values = on.table[f"by_{field}"]
    groups = {value: (values == value).to_numpy(dtype=bool) for value in sorted(set(values.dropna()), key=str)}
    parts = {str(value): on.only(rows) for value, rows in groups.items() if rows.sum() >= SMALLEST}
    rated = dict(zip(parts, reached(list(parts.values()), samples=samples, seed=seed), strict=True))
    found = []
    for a, b in combinations(rated, 2):
        gap = difference(rated[a], rated[b])
        if gap and gap["difference"] < 0:
            a, b, gap = b, a, difference(rated[b], rated[a])
        if gap:
            found.append({"field": field, "higher": a, "lower": b, **gap})
    return sorted(found, key=lambda gap: -gap["difference"])[:1]


class Reached(NamedTuple):
    """AUROC of a set of rows."""

    values: Floats  # (runs, L)
    draws: Floats  # (runs, samples, L)
    smaller: Floats  # (L,): subjects of the smaller class


def reached(parts: Sequence[Scored], *, samples: int, seed: int) -> list[Reached]:
    """The AUROC of each part, on the same resampled subjects."""
    subject = pd.factorize(np.concatenate([[], *(part.table["subject_id"] for part in parts)]))[0]
    found, start = [], 0
    for part in parts:
        own, start = subject[start : start + len(part.table)], start + len(part.table)
        absent = np.isnan(part.runs).any(axis=(0, 1))  # (L,)
        labels = np.where(absent, np.nan, part.labels.astype(np.float64))
        more: dict[str, Any] = {"samples": samples, "seed": seed, "metrics": ["auroc"]}
        rated = [
            distribution(labels, np.where(absent, 0, run), own, num_groups=int(subject.max()) + 1, **more)
            for run in part.runs
        ]
        values, draws = (np.stack([of[i]["auroc"] for of in rated]) for i in (0, 1))
        found.append(Reached(values, draws, smaller_class(labels, own)))
    return found


def difference(a: Reached, b: Reached) -> dict[str, Any] | None:
    """Macro AUROC of two parts over the labels that have both classes in both, and its difference; None without such a
    label."""
    common = ~np.isnan(a.values[0]) & ~np.isnan(b.values[0])
    if not common.any():
        return None
    ends = [macro(part.values, common) for part in (a, b)]  # (runs,)
    draws = np.stack([macro(x, common) - macro(y, common) for x, y in zip(a.draws, b.draws, strict=True)])
    gap = float((ends[0] - ends[1]).mean())
    df = degrees(np.minimum(a.smaller, b.smaller)[common].mean())
    low, high = spread([(ends[0] - ends[1], draws)], df).around(gap, within=DIFFERENCE)
    means = {"a": float(ends[0].mean()), "b": float(ends[1].mean())}
    return {**means, "difference": gap, "low": low, "high": high, "labels": int(common.sum())}
