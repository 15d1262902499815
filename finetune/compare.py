"""Compare methods: paired differences on the same subjects, over training seeds if there are several.

Input: predictions of two methods on the same test rows, one or more runs (training seeds) each. Output: one row per
label and one for `macro`, the primary comparison: difference, interval, p, and p adjusted by Holm over the labels.
Interval and p are Student's, of `resample.spread`: subjects vary jointly for both methods, and if both have several
runs, runs vary too (as pairs if their seeds are equal), so the result is about the methods. With fewer than three
trainings of a method, `claim` is `one run`: the result is about these runs only. Probes of one pretraining count as one
training, whatever their seeds.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from configs import UserError
from ehr_features.files import digest, file_digest, new_file
from ehr_features.typed import read_json
from finetune import metrics, resample
from finetune.config.shapes import ROW_IDS, GridJson
from finetune.metrics import by_count, check, distribution, macro, thirds
from finetune.names import named, unit, without_seed
from finetune.resample import DIFFERENCE, Floats, degrees, smaller_class, spread
from finetune.results import check_table, decimals, each_training, read_predictions, read_results, write_table
from finetune.run_folders import Run, read_run

Resampled = tuple[dict[str, Floats], dict[str, Floats]]  # what `metrics.distribution` returns
ENOUGH_SEEDS = 3
COSTS = ("parameters", "image_size", "films_seen", "films_trained", "processor_seconds")
CARRIED = {
    "parameters": "parameters",
    "image_size": "px",
    "films_seen": "films seen",
}  # columns added to each row of a comparison


def paired(
    labels: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any],
    *,
    groups: NDArray[Any],
    names: Sequence[str] | None = None,
    metric: str = "auroc",
    samples: int = 1000,
    seed: int = 0,
    same_seeds: bool = False,
    macros: Mapping[str, Sequence[str]] | None = None,
    drawn: Drawn | None = None,
) -> pd.DataFrame:
    """Compare two methods on the same rows.

    Args:
        labels: (N, L) 1, 0, NaN.
        a, b: (runs, N, L) probabilities of each training run of each method. A label that a run did not learn (a column
            of NaN) is left out.
        groups: (N,) subjects.
        same_seeds: run i of `a` and run i of `b` share their seed: their differences are what varies.
        macros: means over some labels beside `macro`.
        drawn: resamples of runs, read and filled: where one run stands in many pairs.
    Returns: label, metric, a, b (means over runs), difference (a - b), low, high, p (two-sided), p_holm, n, runs_a,
        runs_b, claim (`method` | `one run`); the first row is `macro`.
    """
    if same_seeds and len(a) != len(b):
        raise UserError(f"same seeds: {len(a)} runs against {len(b)}; wanted one of each for every seed")
    absent = np.isnan(np.concatenate([a, b])).all(1).any(0)  # (L,)
    y, _, named, group = check(labels, np.where(absent, 0.0, a[0]), names, groups)
    y = np.where(absent, np.nan, y)
    num = int(group.max()) + 1
    more = {"samples": samples, "seed": seed, "metrics": [metric], "num_groups": num}
    drawn = Drawn() if drawn is None else drawn

    def resampled(scores: NDArray[Any]) -> Any:
        s = np.ascontiguousarray(np.where(absent, 0.0, scores), np.float64)
        key = hashlib.blake2b(b"".join([y.tobytes(), group.tobytes(), s.tobytes(), repr(more).encode()])).digest()
        if key not in drawn:
            drawn[key] = distribution(y, s, group, **more)  # type: ignore[arg-type]
        return drawn[key]

    found = [[resampled(s) for s in runs] for runs in (a, b)]
    both, smaller = ~np.isnan(found[0][0][0][metric]), smaller_class(y, group)
    groups_of = {name: both & np.isin(named, list(members)) for name, members in (macros or {}).items()}
    chosen = {"macro": both} | {name: member for name, member in groups_of.items() if member.any()}
    first = len(chosen)
    chosen |= {name: both & (np.arange(len(named)) == i) for i, name in enumerate(named)}
    rows = []
    for name, member in chosen.items():
        # per side: values (runs,) and resamples (runs, samples)
        values = [np.array([macro(value[metric][None], member)[0] for value, _ in runs]) for runs in found]
        draws = [np.stack([macro(drawn[metric], member) for _, drawn in runs]) for runs in found]
        means = [float(of.mean()) for of in values]
        sides = [(values[0], draws[0]), (-values[1], -draws[1])]
        if same_seeds:
            sides = [(values[0] - values[1], draws[0] - draws[1])]
        gap = means[0] - means[1]
        varies = spread(sides, degrees(float(smaller[member].mean())) if member.any() else np.nan)
        n = int((~np.isnan(y[:, member])).any(1).sum())
        rows.append(
            [
                name,
                metric,
                *means,
                gap,
                *varies.around(gap, within=DIFFERENCE),
                varies.p(gap),
                np.nan,
                n,
                len(a),
                len(b),
            ]
        )
    columns = ["label", "metric", "a", "b", "difference", "low", "high", "p", "p_holm", "n", "runs_a", "runs_b"]
    table = pd.DataFrame(rows, columns=columns)
    table.loc[first:, "p_holm"] = holm(table["p"].to_numpy()[first:])
    table["claim"] = "method" if min(len(a), len(b)) >= ENOUGH_SEEDS else "one run"
    return table


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down adjustment; NaN stays NaN and is not counted."""
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else steps
    return adjusted


def compare_runs(
    a: Sequence[str | Path],
    b: Sequence[str | Path],
    *,
    split: str = "test",
    samples: int = 1000,
    seed: int = 0,
    drawn: Drawn | None = None,
) -> pd.DataFrame:
    """`paired` of run folders, on the rows that they scored; a fusion with `seeds` above 1 counts as its trainings.

    Args:
        drawn: as in `paired`.
    Returns: as `paired`; each row also carries parameters, input size and films seen of a and b (the first run's).
    Raises: UserError: other films, labels or values than in the first run.
    """
    a, b = each_training(a), each_training(b)
    first: tuple[list[Any], NDArray[Any], NDArray[Any], list[str]] | None = None
    scores: list[list[NDArray[Any]]] = [[], []]
    abouts: list[list[dict[str, Any]]] = [[], []]
    for side, runs in enumerate((a, b)):
        for folder in runs:
            about, _ = read_results(folder)
            keys, labels, probabilities, groups, names = _units(folder, split)
            if first is None:
                first = (keys, labels, groups, names)
            if first[0] != keys or first[3] != names or not np.array_equal(first[1], labels, equal_nan=True):
                raise UserError(
                    f"{folder}: not the same {split} rows and labels as {a[0]}; compare runs of one features folder, "
                    "with the same views, labels and unit"
                )
            scores[side].append(probabilities)
            abouts[side].append(about)
    assert first is not None, "no runs given"
    seeds = [[int(about["seed"]) for about in of] for of in abouts]
    stacked = [np.stack(of)[np.argsort(own, kind="stable")] for of, own in zip(scores, seeds, strict=True)]
    more: dict[str, Any] = {
        "names": first[3],
        "samples": samples,
        "seed": seed,
        "same_seeds": pairs(*seeds),
        "drawn": drawn,
    }
    shares = abouts[0][0].get("prevalence")  # of the film tasks
    macros = thirds(shares) if shares else None
    table = paired(first[1], *stacked, groups=first[2], macros=macros, **more)
    if shares:
        table = pd.concat([table, _by_count(first[1], stacked, first[2], more)], ignore_index=True)
    table["claim"] = "method" if min(map(trainings, abouts)) >= ENOUGH_SEEDS else "one run"
    for name, of in zip("ab", abouts, strict=True):
        by = of[0].get("compared_by") or {}
        table = table.assign(**{f"{key}_{name}": by.get(key) for key in CARRIED})
    return table


def against(
    folder: str | Path,
    baseline: str | None = None,
    *,
    split: str = "test",
    samples: int = 1000,
    seed: int = 0,
    drawn: Drawn | None = None,
) -> pd.DataFrame:
    """Each method of a grid against one of them, on the grid's last step.

    Args:
        folder: what `grid` wrote; runs that differ by their seed alone are trainings of one method.
        baseline: a method's name; None: the first.
        drawn: as in `paired`.
    Returns: method, parameters, image_size, films_seen, films_trained, processor_seconds (mean over runs), runs, auroc,
        and against the baseline difference, low, high, p, p_holm (over all methods of the table), claim.
    Raises: UserError: not a grid's folder, no such method, or no complete run of one.
    """
    path = Path(folder) / "grid.json"
    if not path.is_file():
        raise UserError(f"{folder}: no grid.json; give the folder that `grid` wrote")
    about = read_json(path, GridJson)
    last = about.get("steps", ["probe"])[-1]
    runs: dict[str, list[str | Path]] = {}
    for name, method in about["methods"].items():
        if (Path(folder) / name / last / "results.json").is_file():
            runs.setdefault(method, []).append(Path(folder) / name / last)
    baseline = baseline or next(iter(runs), None)
    if baseline is None or baseline not in runs:
        raise UserError(f"{path}: no complete run of `{baseline}` has {last}/; complete: {', '.join(runs) or 'none'}")
    rows: list[dict[str, Any]] = []
    drawn = Drawn() if drawn is None else drawn  # resamples of the baseline's runs, for every comparison
    for method, own in runs.items():
        by = [read_results(run)[0].get("compared_by") or {} for run in own]
        row: dict[str, Any] = {"method": method} | {key: by[0].get(key) for key in COSTS}
        seconds = [b["processor_seconds"] for b in by if b.get("processor_seconds") is not None]
        row |= {"processor_seconds": float(np.mean(seconds)) if seconds else None, "runs": len(own)}
        found = compare_runs(own, runs[baseline], split=split, samples=samples, seed=seed, drawn=drawn).iloc[0]
        row["auroc"] = found["a"]
        if method != baseline:
            row |= {key: found[key] for key in ("difference", "low", "high", "p", "claim")}
        rows.append(row)
    table = pd.DataFrame(rows, columns=["method", *COSTS, "runs", "auroc", "difference", "low", "high", "p", "claim"])
    table.insert(len(table.columns) - 1, "p_holm", holm(table["p"].to_numpy(np.float64)))
    return table


def show_against(folder: str, baseline: str | None, *, split: str, samples: int, seed: int, out: str | None) -> None:
    """Print `against`, and write it to `out` (.csv, .md, .tex) if given."""
    if out is not None:
        check_table(out)
    table = against(folder, baseline, split=split, samples=samples, seed=seed)
    if out is not None:
        write_table(out, table)
    print(f"AUROC on {split}, mean over labels; differences from {baseline or table['method'].iloc[0]}")
    print(table.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
    if out is not None:
        print(f"wrote {out}")


def pairs(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether each seed is there once on both sides, so that runs in the order of their seeds are pairs."""
    return sorted(a) == sorted(b) and len(set(a)) == len(a)


def _by_count(
    labels: NDArray[Any], stacked: Sequence[NDArray[Any]], groups: NDArray[Any], more: Mapping[str, Any]
) -> pd.DataFrame:
    """`macro` on the films with one, two, three and more findings."""
    rows = []
    for name, keep in by_count(more["names"], labels.astype(np.float32)).items():
        if keep.any():
            part = paired(labels[keep], *(s[:, keep] for s in stacked), groups=groups[keep], **more)
            rows.append(part.iloc[:1].assign(label=f"macro, {name}"))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def trainings(abouts: Sequence[Mapping[str, Any]]) -> int:
    """Number of trainings behind runs, from `run` of results.json: distinct weights if pretrained, else distinct
    seeds."""
    by = [about.get("compared_by") or {} for about in abouts]
    pretrained = [b["hash"] for b in by if b.get("hash") and str(b.get("weights")).startswith("step")]
    return len(set(pretrained)) if len(pretrained) == len(abouts) else len({about["seed"] for about in abouts})


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Differences between two runs of `probe` besides the encoder."""
    found = []
    for name, of in (
        ("method", lambda about: about.get("model")),
        ("head grid and pools", lambda about: about.get("grid")),
        ("train films", lambda about: [fit.get("films") for fit in about.get("fractions") or ()]),
        ("training labels", lambda about: about.get("labels")),
    ):
        if of(a) != of(b):
            found.append(f"{name}: a {_say(of(a))}, b {_say(of(b))}")
    return found


def show(
    a: Sequence[str], b: Sequence[str], *, split: str, samples: int, seed: int, out: str | None = None
) -> pd.DataFrame:
    """Print `compare_runs`, and write it to `out` (.csv, .md, .tex) if given."""
    if out is not None:
        check_table(out)
    table = compare_runs(a, b, split=split, samples=samples, seed=seed)
    if out is not None:  # before printing, which may fail (`| head`)
        write_table(out, table)
    every = [[read_results(folder)[0] for folder in each_training(runs)] for runs in (a, b)]
    abouts = [of[0] for of in every]
    sides = _sides(a, b)
    print(f"AUROC on {split}, {table['n'].iloc[0]:,} {unit(sides[0])}")
    for side, of, runs in zip("ab", sides, (a, b), strict=True):
        by = of.result.get("compared_by") or {}
        size = [f"{_say(by.get(key))} {what}" for key, what in CARRIED.items()]
        print(f"  {side} = {of.called}: {', '.join(size)}  [{', '.join(map(str, runs))}]")
    for difference in differences(*abouts):
        print(f"  not the encoder alone: {difference}")
    carried = [f"{key}_{side}" for key in CARRIED for side in "ab"]
    shown = table.drop(columns=["metric", "runs_a", "runs_b", "claim", *carried])
    print(shown.to_string(index=False, float_format=decimals, na_rep="-"))
    print(_bounds(table.iloc[0], pairs(*([about["seed"] for about in of] for of in every))))
    if out is not None:
        print(f"wrote {out}")
    return table


def _sides(a: Sequence[str], b: Sequence[str]) -> list[Run]:
    """The first run of each side under its model's name, without what is printed beside it: folders, several seeds."""
    first = []
    for runs in (a, b):
        whole = (Path(runs[0]) / "results.json").is_file()  # else a folder that holds trainings alone
        first.append(read_run(Path(runs[0] if whole else each_training(runs)[0]), str(runs[0])))
    sides = []
    for run, runs in zip(named(first), (a, b), strict=True):
        name = run.called.removesuffix(f" [{run.name}]")
        sides.append(replace(run, called=without_seed(name) if len(runs) > 1 else name))
    return sides


def _bounds(row: pd.Series, paired_seeds: bool) -> str:
    """Limits of the primary comparison."""
    n, m = int(row["runs_a"]), int(row["runs_b"])
    if row["claim"] == "one run":
        return f"this compares the runs at hand; a claim between methods takes {ENOUGH_SEEDS} trainings of each"
    said = f"a true difference below {(row['high'] - row['low']) / 2:.3f} would be missed more often than found"
    floor = (
        2 / 2**n if paired_seeds else 2 / comb(n + m, n)
    )  # smallest p of the exact test by sign-flips or permutations
    if floor > 0.05:
        said += (
            f"\nwith {n} and {m} trainings p and interval assume that trainings vary normally, which so few cannot "
            f"show; a test without this assumption cannot give p below {floor:.2g}"
        )
    return said


def _units(folder: str | Path, split: str) -> tuple[list[Any], Any, Any, Any, list[str]]:
    """keys, labels (N, L), probabilities (N, L), subjects, names, sorted by key."""
    ids, labels, logits = read_predictions(folder, split)
    key = ids[next(name for name in ROW_IDS if name in ids and ids[name].notna().all() and ids[name].is_unique)]
    order = np.argsort(key.to_numpy(), kind="stable")
    y, p = labels.to_numpy(np.float64)[order], expit(logits.to_numpy(np.float64))[order]
    return key.iloc[order].tolist(), y, p, ids["subject_id"].to_numpy()[order], [str(name) for name in labels]


def _say(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "unknown" if value is None else str(value)


# ---- Resamples that are drawn once


class Drawn(MutableMapping[bytes, Resampled]):
    """Digest of labels, scores, subjects and settings -> resamples: a report that is made again reads them.

    Args:
        folder: of files resamples_DIGEST.npz, as `probe` and `fuse` keep features in RUNS/cache; None keeps them in
            memory alone. A folder that cannot be written to does no harm.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: dict[bytes, Resampled] = {}

    def __getitem__(self, key: bytes) -> Resampled:
        if key not in self._held:
            self._held[key] = self._read(key)
        return self._held[key]

    def __setitem__(self, key: bytes, value: Resampled) -> None:
        self._held[key] = value
        if (path := self._path(key)) is None:
            return
        arrays = {f"{kind}_{name}": of for kind, part in zip("vd", value, strict=True) for name, of in part.items()}
        try:
            with new_file(path) as part, part.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except OSError:  # read-only, or full: they are drawn again the next time
            self.folder = None

    def __delitem__(self, key: bytes) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def _path(self, key: bytes) -> Path | None:
        return None if self.folder is None else self.folder / f"resamples_{digest([_code(), key.hex()])}.npz"

    def _read(self, key: bytes) -> Resampled:
        """Raises: KeyError: there is no such file, or it is damaged."""
        path = self._path(key)
        if path is None or not path.is_file():
            raise KeyError(key)
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                values, draws = ({n[2:]: arrays[n] for n in arrays if n[:2] == f"{kind}_"} for kind in "vd")
        except (OSError, ValueError, BadZipFile, EOFError):
            raise KeyError(key) from None
        return values, draws


@functools.cache
def _code() -> str:
    """Of the code that draws: another version's resamples are not read."""
    return digest([file_digest(str(module.__file__)) for module in (resample, metrics)])
