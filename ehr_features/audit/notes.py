"""The audit of notes: leaks, and how well the notes alone predict each finding.

Input: a folder of notes and their features. Output: verdicts, and a table: for each finding the AUROC of a bag of words
on the test split, before and after the leak filter, with the words of largest weight. Words such as complaints or home
drugs that predict a finding are no leak; a word that names the finding is one.

Texts are read a batch at a time: all are checked, and at most FILMS of them are held, for the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import UserError
from ehr_features.audit.verdict import Verdict, cannot, decide
from ehr_features.config import EVALUATION
from ehr_features.files import AGAIN, check_table, read_table
from ehr_features.labels import findings
from ehr_features.notes import leak_filter
from ehr_features.schema import FINDINGS
from ehr_features.typed import read_json
from ehr_features.typed.read import undamaged
from ehr_features.typed.shapes import Provenance

BATCH = 8192  # texts in memory at once
FILMS = 50_000  # drawn for the table where there are more
SAMPLES = 300  # resamples of the test subjects
WORDS = 5  # words listed per finding
TOKEN = r"(?u)\b[^\W\d_][\w'\-]*\b"  # words; bare numbers are excluded


@dataclass(frozen=True)
class Predicted:
    """How well notes predict a finding on test films: AUROC with its interval, and the words of largest weight."""

    auroc: float
    low: float
    high: float
    words: tuple[tuple[str, float], ...]


def is_notes(folder: Path) -> bool:
    """Whether `ehr-msn notes` wrote this folder."""
    return (folder / "notes.parquet").is_file()


def features_of(folder: Path) -> Path:
    """The features of a folder of notes, from its config."""
    path = folder / "provenance.json"
    if not (given := (read_json(path, Provenance).get("config") or {}).get("features")):
        raise UserError(f"{path}: `config.features` is missing; was it copied whole?")
    return Path(given)


def audit_notes(folder: Path, features: Path) -> tuple[list[Verdict], list[str]]:
    """Check a folder of notes.

    Args:
        folder: with notes.parquet. features: the folder from which they were made.
    Returns: verdicts, and the lines of the prediction table.
    Raises: UserError: not such a folder, or a damaged table.
    """
    config = read_json(folder / "provenance.json", Provenance).get("config") or {}
    keys = ["dicom_id", "subject_id", "split"]
    notes = read_table(folder, "notes", [*keys, "available_at"], values=False)
    images = read_table(features, "images", [*keys, "taken_at", *FINDINGS], values=False)
    mode = str(config.get("filter", "none"))
    verdicts = [check_times(folder, notes, images), check_names(folder)]
    before = "notes" if mode == "none" else "unfiltered"
    there = (folder / f"{before}.parquet").is_file()
    if mode != "none":
        claim = f"{folder}: the leak filter depends on each note alone"
        verdicts.append(check_filter(claim, folder, mode) if there else cannot(claim, "unfiltered.parquet is missing"))
    if not there:
        return verdicts, []
    labelled = notes[["dicom_id"]].drop_duplicates().merge(images, on="dicom_id", validate="1:1")
    return verdicts, table(labelled, folder, before, mode, int(config.get("seed", 0)))


def batches(folder: Path, name: str) -> Iterator[pa.RecordBatch]:
    """The texts of notes.parquet or unfiltered.parquet: dicom_id, note (empty where it is null)."""
    path = check_table(folder, name)
    with undamaged(path, AGAIN), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH, columns=["dicom_id", "note"]):
            texts = pc.fill_null(batch["note"].cast(pa.string()), "")
            yield pa.RecordBatch.from_arrays([batch["dicom_id"], texts], ["dicom_id", "note"])


def check_times(folder: Path, notes: pd.DataFrame, images: pd.DataFrame) -> Verdict:
    """Each film has one note, of its own subject and split, known when the film was taken."""
    at = notes.merge(
        images[["dicom_id", "subject_id", "split", "taken_at"]], "left", "dicom_id", suffixes=("", "_film")
    )
    known = at["taken_at"].notna()
    bad = {
        "films with two notes": int(notes["dicom_id"].duplicated().sum()),
        "notes of films that are not in the features, or without a time": int((~known).sum()),
        "notes with facts from after their film": int((at["available_at"] > at["taken_at"]).sum()),
        "notes without a time": int(at["available_at"].isna().sum()),
        "notes of another subject than their film": int((known & (at["subject_id"] != at["subject_id_film"])).sum()),
        "notes in another split than their film": int((known & (at["split"] != at["split_film"])).sum()),
    }
    return decide(f"{folder}: every note belongs to its film and has no later fact", bad, f"{len(notes)} notes")


def check_names(folder: Path) -> Verdict:
    """No note contains a term of a finding or of imaging."""
    bad, rows = Counter[str](), 0
    for batch in batches(folder, "notes"):
        rows += len(batch)
        _, counts = leak_filter.apply(batch["note"], "standard")
        bad.update({f"terms of {group}": pc.sum(n).as_py() or 0 for group, n in counts.items()})
    return decide(f"{folder}: no note names a finding", +bad, f"{rows} notes, the terms of `standard`")


def check_filter(claim: str, folder: Path, mode: str) -> Verdict:
    """The filter depends on each note alone: filtering the unfiltered notes again gives the same bytes."""
    both = pd.concat([_digests(folder, "notes"), _digests(folder, "unfiltered", mode)], axis=1)
    different = int((both.iloc[:, 0] != both.iloc[:, 1]).sum())
    return decide(claim, {"notes that change when they are filtered again": different}, f"{len(both)} notes, {mode}")


def _digests(folder: Path, name: str, mode: str = "none") -> pd.Series:
    """dicom_id -> a hash of its note after the filter. The first note of a film, where it has two."""
    parts = []
    for batch in batches(folder, name):
        texts, _ = leak_filter.apply(batch["note"], mode)
        hashes = pd.util.hash_array(texts.to_numpy(zero_copy_only=False), categorize=False)
        parts.append(pd.Series(hashes, index=batch["dicom_id"].to_pandas()))
    every = pd.concat(parts) if parts else pd.Series(dtype="uint64")
    return every[~every.index.duplicated()]


def table(films: pd.DataFrame, folder: Path, before: str, mode: str, seed: int) -> list[str]:
    """A line for each finding.

    Args:
        films: dicom_id, subject_id, split and the 14 findings. before: the table of the texts before the filter.
    """
    every, films = len(films), films.sample(min(FILMS, len(films)), random_state=seed).sort_index()
    labels = findings(films, EVALUATION)
    told_before = _texts(folder, before, films["dicom_id"])
    again = leak_filter.apply(pa.array(told_before, pa.string()), "standard")[0].to_pandas() if mode == "none" else None
    texts = {"before": told_before, "after": _texts(folder, "notes", films["dicom_id"]) if again is None else again}
    train, test = (films["split"] == "train").to_numpy(), (films["split"] == "test").to_numpy()
    told = {name: predictions(text, labels, films["subject_id"], train, test, seed) for name, text in texts.items()}
    named = "standard, not applied to these notes" if mode == "none" else mode
    drawn = f"; {len(films):,} films drawn from {every:,}" * (len(films) < every)
    lines = [  # a line for each finding follows
        "findings predicted from notes alone",
        f"  a bag of words, fitted on train films; AUROC on test films, 95% interval over subjects{drawn}",
        f"  before and after the leak filter ({named}); * names a finding or imaging",
        f"{'finding':<28}{'films':>7}{'with':>7}  {'before':<22}{'after':<22}words",
    ]
    for name in FINDINGS:
        y = labels[name].to_numpy(dtype=float, na_value=np.nan)[test]
        row = f"{name:<28}{int(np.isfinite(y).sum()):>7}{int(np.nansum(y)):>7}  "
        shown = [told[which][name] for which in ("before", "after")]
        row += "".join(f"{_interval(p):<22}" for p in shown)
        lines.append(row + " | ".join(_words(p) for p in shown if not isinstance(p, str)))
    return lines


def _texts(folder: Path, name: str, films: pd.Series) -> pd.Series:
    """The note of each film, empty where it has none."""
    wanted = pa.array(films, pa.string())
    parts = [batch.filter(pc.is_in(batch["dicom_id"].cast(pa.string()), wanted)) for batch in batches(folder, name)]
    if not parts:  # no note at all
        return pd.Series("", index=films.index)
    found = pd.concat([part.to_pandas() for part in parts]).drop_duplicates("dicom_id").set_index("dicom_id")["note"]
    return films.map(found).fillna("")


def _interval(p: Predicted | str) -> str:
    return p if isinstance(p, str) else f"{p.auroc:.3f} ({p.low:.3f} - {p.high:.3f})"


def _words(p: Predicted) -> str:
    named = {word for word, _ in p.words if leak_filter.remove(word) != word}
    return ", ".join(f"{word}{'*' if word in named else ''} {weight:+.2f}" for word, weight in p.words)


def predictions(
    texts: pd.Series, labels: pd.DataFrame, subjects: pd.Series, train: np.ndarray, test: np.ndarray, seed: int
) -> dict[str, Predicted | str]:
    """Predict each finding from texts alone.

    Args:
        texts: (N,). labels: (N, 14), null if unknown. subjects: (N,), the units of resampling. train, test: (N,) masks.
    Returns: finding -> its prediction, or the reason why there is none.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(binary=True, min_df=3, max_features=20_000, token_pattern=TOKEN)
    try:
        counts = words.fit(texts[train]).transform(texts)
    except ValueError:  # no word is frequent enough
        return {str(name): "too few words" for name in labels}
    weights = _resamples(subjects.to_numpy()[test], seed)
    out: dict[str, Predicted | str] = {}
    for name in map(str, labels):
        y = labels[name].to_numpy(dtype=float, na_value=np.nan)
        fit, look = train & np.isfinite(y), np.isfinite(y[test])
        if len(np.unique(y[fit])) < 2 or len(np.unique(y[test][look])) < 2:
            out[name] = "one class only"
            continue
        model = LogisticRegression(C=0.1, max_iter=500).fit(counts[fit], y[fit])
        score = model.decision_function(counts[test])
        aurocs = [weighted_auroc(score[look], y[test][look], w[look]) for w in weights]
        drawn = [a for a in aurocs[1:] if a is not None]
        low, high = np.percentile(drawn, [2.5, 97.5]) if drawn else (np.nan, np.nan)
        top = np.argsort(-np.abs(model.coef_[0]), kind="stable")[:WORDS]
        names = words.get_feature_names_out()
        told = tuple((str(names[k]), float(model.coef_[0][k])) for k in top)
        out[name] = Predicted(float(aurocs[0] or 0.0), float(low), float(high), told)
    return out


def _resamples(subjects: np.ndarray, seed: int) -> list[np.ndarray]:
    """Row weights: ones, then the bootstrap count of each row's subject, SAMPLES times."""
    known, place = np.unique(subjects, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(0, len(known), len(known)), minlength=len(known)) for _ in range(SAMPLES))
    return [np.ones(len(subjects)), *(counts[place].astype(float) for counts in drawn)]


def weighted_auroc(score: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float | None:
    """AUROC with row weights; None with one class only."""
    _, place = np.unique(score, return_inverse=True)
    positive, negative = np.bincount(place, weight * label), np.bincount(place, weight * (1 - label))
    total = positive.sum() * negative.sum()
    return float((positive * (negative.cumsum() - negative / 2)).sum() / total) if total > 0 else None


def split_folders(folders: Sequence[Path]) -> tuple[Path, list[Path], list[Path]]:
    """Sort the audit's arguments into FEATURES, runs and notes; notes in the first place imply their features."""
    notes = [folder for folder in folders if is_notes(folder)]
    others = [folder for folder in folders if not is_notes(folder)]
    if others and others[0] == folders[0]:
        return others[0], others[1:], notes
    features = features_of(notes[0])
    if not (features / "images.parquet").is_file():
        raise UserError(f"{notes[0]}: its features {features} do not exist; name them first: audit FEATURES {notes[0]}")
    return features, others, notes
