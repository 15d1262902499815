"""Metrics of predictions, with intervals over subjects and, if there are several, over trainings.

Input: labels and scores, one column per label. Output: a table with one row per label and metric, and label `macro`.
Rules: a missing (NaN) label leaves its row out for that label. A label with one class in the sample, or without scores,
has no value but a reason. The macro is the mean over the labels with a value. A resample in which a label has one class
is skipped for that label's variance, and its macro is computed without that label; if more than 5% of the resamples are
skipped (fewer than about three positive subjects), the interval is null.
Intervals are those of `resample.spread`, on the logit scale for metrics between 0 and 1. The calibration intercept and
slope of a resample are one Newton step from the whole sample's fit. The binned calibration error has no interval: it is
biased upwards, and more so in a resample than in the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from configs import UserError
from ehr_features.progress import Bar
from finetune.resample import (
    PROBABILITIES,
    RANKS,
    THRESHOLDED,
    Floats,
    Label,
    calibrated_error,
    degrees,
    multiplicities,
    one_thread,
    smaller_class,
    spread,
)

UNBOUNDED = ("calibration_slope", "calibration_intercept")
FEW = "no interval: more than 5% of the resamples have one class only"
AT_LIMIT = "no interval: the value is at its limit, and every resample gives the same"
NOT_LEARNED = "not learned: no scores for this label"
NO_PROBABILITIES = "scores outside [0, 1] are not probabilities"
COLUMNS = ["label", "metric", "value", "low", "high", "n", "positives", "reason"]


class _Sample(NamedTuple):
    """Values common to all rows of the table."""

    names: list[str]
    known: NDArray[np.bool_]  # (N, L)
    positives: NDArray[np.intp]  # (L,)
    both: NDArray[np.bool_]  # (L,): both classes, and scores
    probabilities: NDArray[np.bool_]  # (L,): scores in [0, 1]
    smaller: Floats  # (L,): subjects of the smaller class
    calibrated: Floats  # (L,): the binned error of perfectly calibrated scores
    reasons: dict[int, str]  # label -> why it has no scores


def evaluate(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    names: Sequence[str] | None = None,
    groups: ArrayLike | None = None,
    samples: int = 1000,
    seed: int = 0,
    thresholds: ArrayLike | None = None,
    macros: Mapping[str, Sequence[str]] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Score predictions, each label and their mean.

    Args:
        labels: (N, L) or (N,), of 0, 1 and NaN (unknown).
        probabilities: like labels, finite where the label is known; for rank metrics any scores will do. A column of
            nothing but NaN is a label that was not learned. (runs, N, L) for several trainings of one method: values
            are means over runs, and intervals hold for other trainings too.
        names: (L,) names of the labels; 0, 1, ... if None.
        groups: (N,) the subject of each row, resampled as a whole; each row on its own if None.
        samples: resamples for the intervals; 0 leaves them null.
        thresholds: (L,) or (runs, L), for F1, sensitivity, specificity, chosen on other data by `f1_thresholds`.
        macros: means over some labels beside `macro`, e.g. {"macro CheXpert-5": [...]}.
        reasons: why a label was not learned.
    Returns: label, metric, value, low, high, n (rows with a label), positives, reason (why value or interval is null).
    Raises: UserError: shapes that differ, other labels than 0 and 1, a score that is not finite.
    """
    given = _floats(probabilities)
    runs = given if given.ndim == 3 else given[None] if given.ndim == 2 else given[None, :, None]
    absent = np.any(np.all(np.isnan(runs), axis=1), axis=0)  # (L,)
    runs = np.where(absent, 0.0, runs)
    y, _, named, group = check(labels, runs[0], names, groups)
    learned = np.where(absent, np.nan, y)
    found = [
        distribution(learned, check(learned, p, named, None)[1], group, samples=samples, seed=seed, thresholds=cut)
        for p, cut in zip(runs, _cuts(thresholds, len(runs), y.shape[1]), strict=True)
    ]
    sample = _sample(y, runs, absent, named, group, reasons or {})
    members = {name: np.arange(len(named)) == i for i, name in enumerate(named)}
    members |= {name: np.isin(named, list(of)) for name, of in {"macro": named, **(macros or {})}.items()}
    rows = [_row(name, member, metric, sample, found) for name, member in members.items() for metric in found[0][0]]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["reason"] = table["reason"].astype(object).where(table["reason"].notna(), None)
    return table


def _sample(
    y: Floats,
    runs: Floats,
    absent: NDArray[np.bool_],
    names: list[str],
    group: NDArray[np.intp],
    reasons: Mapping[str, str],
) -> _Sample:
    known, positives = ~np.isnan(y), (y == 1).sum(0)
    scores = [runs[:, k, i] for i, k in enumerate(known.T)]  # of each label (runs, n)
    return _Sample(
        names=names,
        known=known,
        positives=positives,
        both=(positives > 0) & (positives < known.sum(0)) & ~absent,
        probabilities=np.array([bool(((of >= 0) & (of <= 1)).all()) for of in scores]),
        smaller=smaller_class(y, group),
        calibrated=np.array([np.mean([calibrated_error(p) for p in of]) for of in scores]),
        reasons={i: reasons.get(name, NOT_LEARNED) for i, name in enumerate(names) if absent[i]},
    )


def _row(
    name: str,
    member: NDArray[np.bool_],
    metric: str,
    sample: _Sample,
    found: Sequence[tuple[dict[str, Floats], dict[str, Floats]]],
) -> list[Any]:
    """One metric of one label, or of the mean over the labels of `member`."""
    label = sample.names.index(name) if name in sample.names else None
    chosen = member & sample.both
    values = np.array([macro(of[metric][None], chosen)[0] for of, _ in found])
    draws = np.stack([macro(of[metric], chosen) for _, of in found])  # (runs, samples)
    n = int(sample.known[:, member].any(1).sum())
    positives = int(sample.positives[member if label is not None else chosen].sum())
    fit = metric not in PROBABILITIES or sample.probabilities[chosen].all()
    value, low, high = float(values.mean()) if fit else np.nan, np.nan, np.nan
    reason: str | None = None
    if np.isnan(value):
        reason = NO_PROBABILITIES if not fit else _no_value(metric, label, n, sample)
    elif metric == "calibration_error":
        error = sample.calibrated[chosen].mean()
        reason = f"no interval: binned errors are biased upwards; scores without any error would reach {error:.3f}"
    else:
        varies = spread([(values, draws)], degrees(sample.smaller[chosen].mean()))
        low, high = varies.around(value, metric not in UNBOUNDED)
        if np.isnan(low):
            reason = AT_LIMIT if value in (0, 1) else FEW
    return [name, metric, value, low, high, n, positives, reason if draws.shape[1] or np.isnan(value) else None]


def check(
    labels: ArrayLike, scores: ArrayLike, names: Sequence[str] | None, groups: ArrayLike | None
) -> tuple[Floats, Floats, list[str], NDArray[np.intp]]:
    """Labels (N, L), scores (N, L), names, and each row's group as 0 .. G - 1. Raises: UserError."""
    y, s = (a[:, None] if a.ndim == 1 else a for a in (_floats(labels), _floats(scores)))
    if y.shape != s.shape or y.ndim != 2 or not y.size:
        raise UserError(
            f"labels are {y.shape} and scores {s.shape}; wanted the same (rows, labels), at least one of each"
        )
    named = [str(i) for i in range(y.shape[1])] if names is None else [str(name) for name in names]
    if len(named) != y.shape[1] or len(set(named)) != len(named):
        raise UserError(
            f"{len(named)} names for {y.shape[1]} labels, {len(set(named))} of them different; wanted one each"
        )
    if "macro" in named:
        raise UserError("a label is called `macro`, which is the name of the mean over labels; rename it")
    for what, bad in (
        ("label is not 0, 1 or NaN", ~(np.isnan(y) | (y == 0) | (y == 1))),
        ("score is not finite", ~np.isfinite(s) & ~np.isnan(y)),
    ):
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise UserError(f"{what}: {bad.sum()} of them, the first in row {row}, label `{named[column]}`")
    if groups is None:
        return y, s, named, np.arange(len(y))
    group, _ = pd.factorize(pd.Series(np.asarray(groups)))
    if len(group) != len(y) or (group < 0).any():
        raise UserError(
            f"{len(group)} groups for {len(y)} rows, {(group < 0).sum()} of them missing; wanted one for each row"
        )
    return y, s, named, group


@one_thread
def distribution(
    y: Floats,
    s: Floats,
    group: NDArray[np.intp],
    *,
    samples: int,
    seed: int,
    thresholds: Floats | None = None,
    metrics: Sequence[str] | None = None,
    num_groups: int | None = None,
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Each metric's values (L,), and its values in each resample (samples, L), NaN where undefined.

    Two calls with the same number of groups, samples and seed see the same resamples, so that differences are paired.
    """
    num_groups, num_labels = num_groups or int(group.max()) + 1, y.shape[1]
    kept = metrics or [*RANKS, "prevalence", *PROBABILITIES, *(THRESHOLDED if thresholds is not None else ())]
    values = {m: np.full(num_labels, np.nan) for m in kept}
    draws = {m: np.full((samples, num_labels), np.nan) for m in kept}
    plans: list[tuple[int, Label]] = []
    for i in range(num_labels):
        known = ~np.isnan(y[:, i])
        if len(np.unique(y[known, i])) == 2:
            cut = None if thresholds is None or np.isnan(thresholds[i]) else float(thresholds[i])
            plan = Label.of(y[known, i], s[known, i], group[known], num_groups, cut, not set(kept) & set(PROBABILITIES))
            plans.append((i, plan))
            for metric, value in plan.statistics(np.ones((num_groups, 1)), kept).items():
                if metric in values:
                    values[metric][i] = value[0]
    done = 0
    with Bar("resampling", samples, "resamples", after=5) as bar:
        for counts in multiplicities(num_groups, samples, seed, rows=len(y)):
            for i, plan in plans:
                for metric, value in plan.statistics(counts, kept).items():
                    if metric in draws:
                        draws[metric][done : done + counts.shape[1], i] = value
            done += counts.shape[1]
            bar.advance(counts.shape[1])
    return values, draws


def macro(values: Floats, both: NDArray[np.bool_]) -> Floats:
    """Mean over the labels with both classes, (R, L) -> (R,); one undefined in a resample is left out of its mean."""
    chosen = values[:, both]
    count = (~np.isnan(chosen)).sum(1)
    return np.where(count > 0, np.nansum(chosen, axis=1) / np.maximum(count, 1), np.nan)


def unlearned(labels: NDArray[np.float32], names: Sequence[str]) -> dict[str, str]:
    """Labels that cannot be learned, and why. Args: labels: (N, L) of the train rows: 1, 0, NaN."""
    found = {}
    for name, column in zip(names, labels.T, strict=True):
        known, positives = int((~np.isnan(column)).sum()), int(np.nansum(column))
        if positives in (0, known):
            found[name] = f"not learned: {positives} positives among {known} train rows"
    return found


def without_value(rows: pd.DataFrame) -> list[str]:
    """The labels of results.json without AUROC, and so excluded from `macro`, by split: for `warnings`."""
    none = rows[(rows["metric"] == "auroc") & (rows["subset"] == "all") & rows["value"].isna()]
    none = none[~none["label"].str.startswith("macro") & ~none.duplicated(["split", "label"])]
    return [
        f"no value and no part in macro, {split}: " + "; ".join(f"{r.label} ({r.reason})" for r in of.itertuples())
        for split, of in none.groupby("split", sort=False)
    ]


def f1_thresholds(labels: ArrayLike, scores: ArrayLike) -> Floats:
    """The threshold with the largest F1 for each label; on validation rows, (N, L) -> (L,)."""
    given = _floats(scores)
    y, s, _, _ = check(np.where(np.isnan(given).all(0), np.nan, _floats(labels)), given, None, None)
    best = np.full(y.shape[1], np.nan)
    for i in range(y.shape[1]):
        known = ~np.isnan(y[:, i])
        outcome, score = y[known, i], s[known, i]
        if not 0 < outcome.sum() < len(outcome):
            continue
        order = np.argsort(-score, kind="stable")
        last = np.append(np.diff(score[order]) != 0, True)  # the last row of each tied score
        true, called = np.cumsum(outcome[order])[last], np.flatnonzero(last) + 1
        best[i] = score[order][last][np.argmax(2 * true / (called + outcome.sum()))]
    return best


def _floats(values: ArrayLike) -> Floats:
    """As float64; pandas' missing values are NaN."""
    if isinstance(values, (pd.DataFrame, pd.Series)):
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.asarray(values, dtype=np.float64)


def _cuts(thresholds: ArrayLike | None, runs: int, labels: int) -> list[Floats | None]:
    if thresholds is None:
        return [None] * runs
    cut = np.asarray(thresholds, dtype=np.float64)
    return list(np.broadcast_to(cut, (runs, labels)))


def _no_value(metric: str, label: int | None, n: int, sample: _Sample) -> str:
    if label is None:
        return "no label has a value"
    if n == 0:
        return "no row has this label"
    if sample.positives[label] in (0, n):
        return f"one class only: {sample.positives[label]} positives of {n}"
    if label in sample.reasons:
        return sample.reasons[label]
    if metric in THRESHOLDED:
        return "no threshold: validation has one class only"
    return "no finite fit: the scores separate the classes, or are all equal"


# ---- Findings by their prevalence, and films by their number of findings, for the value of notes.

THIRDS = ("macro rarest third", "macro middle third", "macro commonest third")
NOT_FINDINGS = ("No Finding", "Support Devices")  # not counted among a film's findings


def prevalence(names: Sequence[str], labels: NDArray[np.float32]) -> dict[str, float]:
    """The share of films with each label among those where it is known.

    Args:
        labels: (N, L) of the train films: 1, 0, NaN.
    """
    known = np.maximum((~np.isnan(labels)).sum(0), 1)
    return {name: float(share) for name, share in zip(names, np.nansum(labels, axis=0) / known, strict=True)}


def thirds(shares: Mapping[str, float]) -> dict[str, list[str]]:
    """The labels in three groups by prevalence; none with fewer than three labels, nor of labels that never occur."""
    found = sorted((name for name, share in shares.items() if share > 0), key=lambda name: (shares[name], name))
    if len(found) < 3:
        return {}
    cut = np.array_split(np.array(found, object), 3)
    return {name: part.tolist() for name, part in zip(THIRDS, cut, strict=True)}


def by_count(names: Sequence[str], labels: NDArray[np.float32]) -> dict[str, NDArray[np.bool_]]:
    """Rows with one, two, and three or more findings: name -> (N,)."""
    counted = [i for i, name in enumerate(names) if name not in NOT_FINDINGS]
    number = (labels[:, counted] == 1).sum(1)
    return {"findings=1": number == 1, "findings=2": number == 2, "findings=3+": number >= 3}


def macro_auroc(labels: NDArray[np.float32], scores: NDArray[Any]) -> NDArray[np.float64]:
    """Mean AUROC over the labels that have both classes, for each head: labels (N, L), scores (N, H, L) -> (H,)."""
    from scipy.stats import rankdata

    values = []
    for i in range(labels.shape[1]):
        known = ~np.isnan(labels[:, i])
        y = labels[known, i] > 0
        if 0 < y.sum() < len(y):
            ranks = rankdata(scores[known, :, i], axis=0)  # (n, H)
            p = y.sum()
            values.append((ranks[y].sum(0) - p * (p + 1) / 2) / (p * (len(y) - p)))
    if not values:
        raise UserError(
            "no label has both classes among the validation films, so nothing can be chosen; use more films, or folds=5"
        )
    return np.mean(values, axis=0)
