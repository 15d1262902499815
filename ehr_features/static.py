"""Encode groups of EHR columns as one vector per film (fit on train, apply to all).

Input: rows of images.parquet and names of groups. Output: (N, S) float32, the columns' names, and the fitted values
(JSON). A missing value is a category or a mask and is never imputed.

Preset `msn` gives the columns, bins and order of the published sets. Differs from CXR-EHR-MSN: a missing view or
position is zero in all its columns (published: imputed by a forest fitted on all rows), and so is every record column
of a subject without a record (published: the film is dropped).
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from configs import UserError
from ehr_features import schema
from ehr_features.config import TEXT_GROUP
from ehr_features.plug_ins import encode_group, is_file, load_group

REPORTING_ONLY = ("race", "insurance", "language", "code_status", "anchor_year_group", "care_unit")


def encode(
    images: pd.DataFrame, groups: Sequence[str], *, preset: str = "default", fitted: dict[str, Any] | None = None
) -> tuple[np.ndarray, list[str], dict[str, Any]]:
    """Encode EHR columns as one vector per film.

    Args:
        images: N rows of images.parquet (any index); `split` is needed when fitting.
        groups: names of `READS`, in the order wanted; with preset `msn` also the names of published sets (`msn_sets`).
        preset: `default`, or `msn` for the published columns.
        fitted: the fitted values of an earlier call; None fits on the rows of split train only.
    Returns: (N, S) float32, S names, fitted values (for JSON). Rows of all splits are encoded.
    Raises: UserError: an unknown group, a column that may not be an input, no train rows to fit on, a missing column.
    """
    names = resolve(groups, preset)
    if missing := sorted(set(reads(names, preset, images.columns)) - set(images)):
        raise UserError(
            f"images: columns {missing} are missing, needed by the groups {names}; build the features again"
        )
    if fitted is None:
        fitted = {"preset": preset, "groups": names, "scales": {}}
        train = _train_rows(images) if preset != "msn" else np.ones(len(images), bool)
    else:
        train = None
        if (fitted.get("preset"), fitted.get("groups")) != (preset, names):
            raise UserError(f"fitted for {fitted.get('groups')} ({fitted.get('preset')}), asked for {names} ({preset})")
    if train is not None and preset != "msn":
        _refuse_empty(images[train], names)
    scale = Scale(fitted["scales"], train)
    columns: Columns = {}
    for name in names:
        made = _encoded(name, images, scale, preset)
        if twice := sorted(columns.keys() & made.keys()):
            raise UserError(f"EHR group {name}: its columns {', '.join(twice)} are those of another group; rename them")
        columns |= made
    array = np.column_stack(list(columns.values())).astype(np.float32) if columns else np.zeros((len(images), 0), "f4")
    if fitted.setdefault("columns", list(columns)) != list(columns):
        raise UserError(f"fitted with the columns {fitted['columns']}, these films give {list(columns)}")
    return array, list(columns), fitted


def resolve(groups: Sequence[str], preset: str = "default") -> list[str]:
    """Check names of groups and expand published sets; each group once, in order. Raises: UserError: no such input."""
    if isinstance(groups, str):
        raise UserError(f"groups: wanted a list, got the text {groups!r}; write [{groups}]")
    if preset not in ("default", "msn"):
        raise UserError(f"ehr preset {preset!r}: wanted default or msn")
    known, sets = (MSN_READS, msn_sets()) if preset == "msn" else (READS, {})
    names: list[str] = []
    for group in groups:
        if group in sets:
            names += sets[group]
        elif group in known:
            names.append(group)
        elif is_file(group) and preset == "default":
            load_group(group)
            names.append(group)
        else:
            raise UserError(_refusal(group, [*known, *sets], preset))
    return list(dict.fromkeys(names))


def reads(groups: Sequence[str], preset: str, there: Iterable[str]) -> list[str]:
    """The columns of images.parquet that some groups read.

    Args:
        there: the columns that the table has.
    Raises: UserError: it has none of `vitals` or `labs`.
    """
    of, there = (MSN_READS if preset == "msn" else READS), list(there)
    out: dict[str, None] = {}
    for group in resolve(groups, preset):
        if is_file(group):
            out |= dict.fromkeys(load_group(group).reads)
            continue
        own = sorted(c for c in there if c.startswith(f"{group}_")) if group in RECORD_GROUPS else of[group]
        if not own:
            raise UserError(
                f"images.parquet has no column of EHR group `{group}`; build the features again with "
                "record_window_hours above 0 (default 24), or leave the group out"
            )
        out |= dict.fromkeys(own)
    return list(out)


def has(group: str, there: Iterable[str]) -> bool:
    """Whether a table with some columns has a group of preset `default`."""
    there = set(there)
    if group in RECORD_GROUPS:
        return any(column.startswith(f"{group}_") for column in there)
    return set(load_group(group).reads if is_file(group) else READS[group]) <= there


def available_at(groups: Sequence[str], preset: str = "default") -> dict[str, str]:
    """When each group is known: `study`, `admission` or `discharge` (the latest of its columns).

    `text` is known at the study: a note from after its film is refused when it is read.
    """
    of, order = (MSN_READS if preset == "msn" else READS), ("study", "admission", "discharge")
    when = {name: column.available_at for name, column in schema.IMAGES.items()}
    columns = resolve(without_text(groups), preset)
    known: dict[str, str] = {
        g: load_group(g).available_at if is_file(g) else max((when[c] for c in of[g]), key=order.index, default="study")
        for g in columns
    }
    return known | ({TEXT_GROUP: "study"} if TEXT_GROUP in groups else {})


def without_text(groups: Sequence[str]) -> list[str]:
    """The groups that images.parquet gives."""
    return [group for group in groups if group != TEXT_GROUP]


def known(array: np.ndarray, columns: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """Whether a film's record tells each column, so that it may be a target.

    A column of a variable with a mask (`..._missing`, which follows its columns) is known where the mask is 0; columns
    after a group's last mask share it. Masks, and the hours since a value, say nothing of the patient, and are never
    known. A group without masks (preset `msn`, `text`) is known where any of its columns is not 0, one of a user's file
    everywhere.

    Args:
        array: (N, S) that `encode` gave; `columns`, `groups`: S names, and the group of each.
    Returns: (N, S) bool.
    """
    out = np.zeros(array.shape, bool)
    for group in dict.fromkeys(groups):
        places = [i for i, name in enumerate(groups) if name == group]
        masks = [i for i in places if columns[i].endswith("_missing")]
        for i in places:
            if not masks:
                out[:, i] = is_file(group) or (array[:, places] != 0).any(axis=1)
            elif i not in masks and not (group in RECORD_GROUPS and columns[i].endswith("_hours")):
                out[:, i] = array[:, next((mask for mask in masks if mask > i), masks[-1])] == 0
    return out


def _encoded(name: str, images: pd.DataFrame, scale: Scale, preset: str) -> Columns:
    """The columns of one group."""
    if is_file(name):
        return encode_group(name, images, scale)
    return MSN[name](images) if preset == "msn" else DEFAULT[name](images, scale)


def _refuse_empty(train: pd.DataFrame, groups: Sequence[str]) -> None:
    """Refuse a group of last values without any value of a train film."""
    for group in set(RECORD_GROUPS) & set(groups):
        if not train[reads([group], "default", train.columns)].notna().any(axis=None):
            raise UserError(
                f"EHR group `{group}`: none of {len(train)} films of split train has a value; {TABLES[group]} holds "
                "none within record_window_hours of `features`. Are its patients those of the films? Else leave "
                "the group out, or widen the window"
            )


def _refusal(group: str, known: Sequence[str], preset: str) -> str:
    if group == TEXT_GROUP:
        return "group `text` is no column: it goes with pretraining's ehr.notes and ehr.text_encoder"
    if group in REPORTING_ONLY:
        return f"group `{group}` is for subgroup reporting only and cannot be an input; remove it from the groups"
    if group in READS:
        return f"group `{group}` does not exist in ehr preset {preset}; it has {', '.join(known)}"
    near = difflib.get_close_matches(group, known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"groups: {', '.join(known)}"
    return f"unknown EHR group `{group}` (ehr preset {preset}); {hint}"


def _train_rows(images: pd.DataFrame) -> np.ndarray:
    if "split" not in images:
        raise UserError("images: column `split` is missing; EHR columns are fitted on the train split only")
    train = (images["split"] == "train").to_numpy()
    if not train.any():
        raise UserError(f"images: none of {len(images)} films is of split train, so EHR columns cannot be fitted")
    return train


# ---- The groups of EHR columns: their inputs from images.parquet, and their output columns.

Columns = dict[str, np.ndarray]  # name -> (N,) values
VIEWS = ("PA", "LATERAL", "AP", "LL")
POSITIONS = ("Erect", "Recumbent")
AGES5, AGES10 = range(20, 91, 5), range(20, 91, 10)  # inner edges: 16 and 9 bins
TRIAGE = ("acuity", "temperature_c", "heart_rate", "resp_rate", "o2sat", "sbp", "dbp")

# Columns of each group; a group is known when the last of its columns is (ehr_features/schema.py).
READS: dict[str, tuple[str, ...]] = {
    "sex": ("sex",),
    "age": ("age_years",),
    "age5": ("age_years",),
    "age10": ("age_years",),
    "view": ("view",),
    "position": ("position",),
    "icu": ("in_icu",),
    "mortality": ("died_in_hospital",),
    "ed_triage": tuple(f"ed_{name}" for name in TRIAGE),
    "arrival": ("hours_since_ed_arrival", "hours_since_hospital_arrival", "hours_since_icu_arrival"),
    "prior_films": ("num_prior_studies", "hours_since_prior_study"),
    "prior_diagnoses": ("num_prior_admissions", "prior_phenotypes"),
}
RECORD_GROUPS = ("vitals", "labs")  # their columns depend on channels.yaml (films/values.py): `reads` finds them
TABLES = {"vitals": "icu/chartevents (and ed/vitalsign)", "labs": "hosp/labevents"}
READS |= {group: () for group in RECORD_GROUPS}
MSN_READS = {name: READS[name] for name in ("sex", "age", "age5", "age10", "position")} | {
    "view": ("view", "view_source"),
    "mortality": ("sex", "msn_died"),
    "icu": ("sex", "msn_in_icu"),
}


@functools.cache
def msn_sets() -> dict[str, list[str]]:
    """The published sets: name -> groups of preset `msn`."""
    given: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("msn_sets.yaml").read_text(encoding="utf-8"))
    return given


def fit_scale(values: np.ndarray, *, constant: float = np.inf, dtype: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (D,) of (N, D).

    Args:
        constant: the deviation given to a constant column; infinite: scaled, the column is 0.
    """
    mean, deviation = values.mean(0, dtype=dtype), values.std(0, dtype=dtype)
    return mean, np.where(deviation < 1e-6 * (1 + np.abs(mean)), deviation.dtype.type(constant), deviation)


SKEWED = 1.0  # skewness (third standardised moment) above which a positive value is scaled as its logarithm


class Scale:
    """Mean 0 and standard deviation 1 over the train rows, with a mask for missing values."""

    def __init__(self, scales: dict[str, list[float]], train: np.ndarray | None) -> None:
        self.scales, self.train = scales, train

    def __call__(self, name: str, values: np.ndarray, *, shaped: bool = False) -> Columns:
        """`shaped`: leave values of 0 and 1 alone, and take the logarithm of skewed positive ones; by the train rows,
        and written as a third number: -1, 1, or 0 for neither."""
        seen = np.isfinite(values)
        if self.train is not None:
            self.scales[name] = _fit_shaped(values[self.train & seen]) if shaped else _fit(values[self.train & seen])
        mean, std = self.scales[name][:2]
        if shaped and self.scales[name][2] == 1:
            values = np.log(np.maximum(values, self.scales[name][3]))
        return {name: np.where(seen, (np.where(seen, values, mean) - mean) / std, 0.0), f"{name}_missing": ~seen}


def _fit(known: np.ndarray) -> list[float]:
    mean, std = fit_scale(known, constant=1.0) if len(known) else (0.0, 1.0)
    return [float(mean), float(std)]


def _fit_shaped(known: np.ndarray) -> list[float]:
    """Mean, deviation, shape (-1: 0 and 1, 1: logarithm, 0: neither), and the least value."""
    least = float(known.min()) if len(known) else 0.0
    if np.isin(known, (0, 1)).all():
        return [0.0, 1.0, -1, least]
    mean, std = _fit(known)
    if least > 0 and float((((known - mean) / std) ** 3).mean()) > SKEWED:
        return [*_fit(np.log(known)), 1, least]
    return [mean, std, 0, least]


def _number(images: pd.DataFrame, column: str) -> np.ndarray:
    return pd.to_numeric(images[column]).astype("float64").to_numpy(dtype=np.float64, na_value=np.nan)


def _one_hot(images: pd.DataFrame, column: str, categories: Sequence[str], *, other: bool = False) -> Columns:
    values = images[column]
    hot: Columns = {f"{column}_{c.lower()}": (values == c).fillna(False).to_numpy(bool) for c in categories}
    if other:
        hot[f"{column}_other"] = (values.notna() & ~values.isin(categories)).to_numpy(bool)
    hot[f"{column}_missing"] = ~np.any(list(hot.values()), axis=0)
    return hot


def _yes_no(images: pd.DataFrame, column: str, yes: str, no: str) -> Columns:
    value = _number(images, column)
    return {yes: value == 1, no: value == 0, f"{column}_missing": np.isnan(value)}


def _bins(age: np.ndarray, edges: Sequence[int], star: str = "", *, right: bool = False) -> Columns:
    """One column per bin; [low, high), or (low, high] with right=True. Bins of a missing age are all 0."""
    lows, highs = [-np.inf, *edges], [*edges, np.inf]
    names = [f"<{edges[0]}{star}", *(f"{a}-{b}" for a, b in itertools.pairwise(edges)), f"{edges[-1]}+{star}"]
    pairs = zip(names, lows, highs, strict=True)
    return {n: (low < age) & (age <= high) if right else (low <= age) & (age < high) for n, low, high in pairs}


def _age_bins(images: pd.DataFrame, edges: range, name: str) -> Columns:
    age = _number(images, "age_years")
    bins = {f"{name}_{label}": hot for label, hot in _bins(age, edges).items()}
    return bins | {f"{name}_missing": np.isnan(age)}


def _scaled(images: pd.DataFrame, columns: Sequence[str], scale: Scale, *, log: bool = False) -> Columns:
    out: Columns = {}
    for column in columns:
        values = _number(images, column)
        out |= scale(f"log_{column}" if log else column, np.log1p(values) if log else values)
    return out


def _last_values(images: pd.DataFrame, scale: Scale, group: str) -> Columns:
    """The last value of each variable, the hours since, and one mask for both.

    Values of 0 and 1 stay so. Of positive values whose skewness on train is above `SKEWED` the logarithm is scaled.
    """
    out: Columns = {}
    for column in reads([group], "default", images.columns):
        if column.endswith("_hours"):
            continue
        hours, value = scale(f"{column}_hours", _number(images, f"{column}_hours")), _number(images, column)
        mask = hours.pop(f"{column}_hours_missing")
        out |= {column: scale(column, value, shaped=True)[column], **hours, f"{column}_missing": mask}
    return out


def _prior_diagnoses(images: pd.DataFrame, scale: Scale) -> Columns:
    """Without a record all groups are 0, and log_num_prior_admissions_missing is 1."""
    from ehr_features.phenotypes import groups as phenotype_groups

    out = _scaled(images, ["num_prior_admissions"], scale, log=True)
    listed = images["prior_phenotypes"].fillna("").astype(str).str.split()
    return out | {
        f"prior_phenotype_{g}": listed.map(lambda ids, g=str(g): g in ids).to_numpy(bool) for g in phenotype_groups()
    }


DEFAULT: dict[str, Callable[[pd.DataFrame, Scale], Columns]] = {
    "sex": lambda images, _: _one_hot(images, "sex", ("M", "F")),
    "age": lambda images, scale: _scaled(images, ["age_years"], scale),
    "age5": lambda images, _: _age_bins(images, AGES5, "age5"),
    "age10": lambda images, _: _age_bins(images, AGES10, "age10"),
    "view": lambda images, _: _one_hot(images, "view", VIEWS, other=True),
    "position": lambda images, _: _one_hot(images, "position", POSITIONS, other=True),
    "icu": lambda images, _: _yes_no(images, "in_icu", "icu", "not_icu"),
    "mortality": lambda images, _: _yes_no(images, "died_in_hospital", "died", "alive"),
    "ed_triage": lambda images, scale: _scaled(images, READS["ed_triage"], scale),
    "arrival": lambda images, scale: _scaled(images, READS["arrival"], scale, log=True),
    "prior_films": lambda images, scale: _scaled(images, READS["prior_films"], scale, log=True),
    "prior_diagnoses": _prior_diagnoses,
    **{group: functools.partial(_last_values, group=group) for group in RECORD_GROUPS},
}


def _msn_clinical(images: pd.DataFrame, column: str, names: tuple[str, str]) -> Columns:
    """(0, 0) without a record; a film outside every admission or stay counts as `no`, as published."""
    recorded, flag = images["sex"].notna().to_numpy(), np.nan_to_num(_number(images, column)) == 1
    return {name: recorded & (flag == (name in ("died", "icu"))) for name in names}


def _msn_view(images: pd.DataFrame) -> Columns:
    named = (images["view_source"] == "ViewPosition").fillna(False).to_numpy(bool)
    return {v: named & (images["view"] == v).fillna(False).to_numpy(bool) for v in VIEWS}


MSN: dict[str, Callable[[pd.DataFrame], Columns]] = {
    "sex": lambda images: {
        n: (images["sex"] == s).fillna(False).to_numpy() for n, s in (("male", "M"), ("female", "F"))
    },
    "age": lambda images: {"age_norm": np.nan_to_num((_number(images, "age_years") - 16) / (100 - 16))},
    "age5": lambda images: _bins(_number(images, "age_years"), AGES5, right=True),
    "age10": lambda images: _bins(_number(images, "age_years"), AGES10, "*", right=True),
    "view": _msn_view,
    "position": lambda images: {p: (images["position"] == p).fillna(False).to_numpy(bool) for p in POSITIONS},
    "mortality": lambda images: _msn_clinical(images, "msn_died", ("alive", "died")),
    "icu": lambda images: _msn_clinical(images, "msn_in_icu", ("icu", "not_icu")),
}
