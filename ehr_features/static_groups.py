"""The groups of EHR columns: what each reads from images.parquet, and the columns that it gives.

Comes in: rows of images.parquet. Goes out: named columns (N,). `DEFAULT` and `MSN` map a group's name to its function;
`MSN_SETS` are the published sets (CXR-EHR-MSN, notebooks EHR-data-prep).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ehr_features.phenotypes import groups as phenotype_groups

Columns = dict[str, np.ndarray]  # name -> (N,) values
VIEWS = ("PA", "LATERAL", "AP", "LL")
POSITIONS = ("Erect", "Recumbent")
AGES5, AGES10 = range(20, 91, 5), range(20, 91, 10)  # inner edges: 16 and 9 bins
TRIAGE = ("acuity", "temperature_c", "heart_rate", "resp_rate", "o2sat", "sbp", "dbp")

# What each group needs; a group is known when the latest of its columns is (ehr_features/schema.py).
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
MSN_READS = {name: READS[name] for name in ("sex", "age", "age5", "age10", "position")} | {
    "view": ("view", "view_source"),
    "mortality": ("sex", "msn_died"),
    "icu": ("sex", "msn_in_icu"),
}
_META, _CLINICAL = ("view", "position"), ("mortality", "icu")
MSN_SETS: dict[str, tuple[str, ...]] = {
    "meta-gender-only": ("sex",),
    "meta-age-norm-only": ("age",),
    "meta-age5-only": ("age5",),
    "meta-age10-only": ("age10",),
    "meta-view-only": ("view",),
    "meta-orientation-only": ("position",),
    "meta-mortality-only": ("mortality",),
    "meta-icu-only": ("icu",),
    "socio-norm": ("sex", "age"),
    "socio-age5": ("sex", "age5"),
    "socio-age10": ("sex", "age10"),
    "image_meta": _META,
    "clinical": _CLINICAL,
    "socio-age-norm-image-meta": ("sex", "age", *_META),
    "socio-age-norm-clinical": ("sex", "age", *_CLINICAL),
    "socio-age-5-image-meta": ("sex", "age5", *_META),
    "socio-age-5-clinical": ("sex", "age5", *_CLINICAL),
    "socio-age-10-image-meta": ("sex", "age10", *_META),
    "socio-age-10-clinical": ("sex", "age10", *_CLINICAL),
    "image-meta-clinical": (*_META, *_CLINICAL),
    "all-age-norm": ("sex", "age", *_META, *_CLINICAL),
    "all-age-5": ("sex", "age5", *_META, *_CLINICAL),
    "all-age-10": ("sex", "age10", *_META, *_CLINICAL),
}


class Scale:
    """Mean 0 and deviation 1 over the train rows, with a mask for what is missing."""

    def __init__(self, scales: dict[str, list[float]], train: np.ndarray | None) -> None:
        self.scales, self.train = scales, train

    def __call__(self, name: str, values: np.ndarray) -> Columns:
        seen = np.isfinite(values)
        if self.train is not None:
            known = values[self.train & seen]
            mean, std = (known.mean(), known.std()) if len(known) else (0.0, 1.0)
            self.scales[name] = [float(mean), float(std) if std > 0 else 1.0]
        mean, std = self.scales[name]
        return {name: np.where(seen, (np.where(seen, values, mean) - mean) / std, 0.0), f"{name}_missing": ~seen}


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
    """One column a bin; [low, high), or (low, high] with right=True. Bins of a missing age are all 0."""
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


def _prior_diagnoses(images: pd.DataFrame, scale: Scale) -> Columns:
    """Without a record all groups are 0, and log_num_prior_admissions_missing is 1."""
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
