"""`ehr-msn score LABELS SCORES`: metrics with intervals for any two arrays.

Input: .npy, .csv or .parquet, including predictions/ of a run (its label_*, logit_* and subject_id are found). Output:
the table of `metrics.evaluate`. A CSV whose first line is numbers has no header, unless they are 0, 1, 2, ... (pandas).
"""

from __future__ import annotations

from collections.abc import Sequence
from tokenize import TokenError
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from configs import UserError, first_line
from ehr_features.files import check_new_file, new_file
from ehr_features.raw.remote import user_table
from ehr_features.typed.read import UNREADABLE
from finetune.metrics import evaluate
from finetune.results import as_text

KEYS = ("sample_id", "dicom_id", "study_id", "stay_id", "subject_id", "hadm_id", "path", "view", "split")
CSV = (".csv", ".csv.gz")


def score(
    labels: str, scores: str, *, groups: str | None = None, samples: int = 1000, seed: int = 0, out: str | None = None
) -> pd.DataFrame:
    """Print the table, and write it to `out` as CSV if given.

    Args:
        labels: rows x labels of 0, 1 and empty. Columns that name the row (`KEYS`) are no labels.
        scores: the same rows; joined on all keys that both files have (`KEYS`, columns of text, and columns beside
            label_*, logit_*), else in the same order. Columns are matched by name where both files name them and share
            some, else by position.
        groups: a file of one column, or with a column subject_id: a subject for each row, joined in the same way. None:
            `labels`' own subject_id, if it has one; else rows are resampled one by one.
    Raises: UserError: a file that is no table of numbers, rows or columns that do not fit, keys that differ and are not
        unique.
    """
    if out is not None:
        check_new_file(out)
    left, right = _read(labels), _read(scores)
    left, right = _whole(labels, left, len(right)), _whole(scores, right, len(left))
    keys = [str(key) for key in left if key in right and _is_key(left, str(key)) and _is_key(right, str(key))]
    y, s = _values(labels, left, "label_", keys), _values(scores, right, "logit_", keys)
    if len(y) != len(s):
        raise UserError(f"{labels} has {len(y)} rows and {scores} {len(s)}; wanted the same rows")
    s = _same_columns(y, s.iloc[_order(labels, left, scores, right, keys)], labels, scores)
    group = left["subject_id"].to_numpy() if "subject_id" in left else None
    if groups:
        group = _groups(groups, labels, left)
    names = [str(c) for c in (s if isinstance(y.columns, pd.RangeIndex) else y).columns]
    try:
        table = evaluate(y.to_numpy(), s.to_numpy(), names=names, groups=group, samples=samples, seed=seed)
    except UserError as error:
        raise UserError(f"{scores if str(error).startswith('score') else labels}: {error}") from None
    if out is not None:  # before printing, which may fail (`| head`)
        with new_file(out) as part:
            as_text(table).to_csv(part, index=False)
    shown = table.drop(columns="reason").round(4).astype(object).where(table.drop(columns="reason").notna(), "-")
    print(shown.assign(reason=table["reason"].fillna("")).to_string(index=False))
    of = f"{len(y):,} rows; --groups FILE resamples subjects" if group is None else f"{len(set(group)):,} subjects"
    print(f"intervals: {samples:,} resamples of {of}")
    if out is not None:
        print(f"wrote {out}")
    return table


def _read(path: str, *, header: bool = True) -> pd.DataFrame:
    """A file as rows x columns; unnamed columns are 0, 1, ... of a RangeIndex."""
    if path.endswith(".npy"):
        try:
            array = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (*UNREADABLE, SyntaxError, TokenError) as error:  # the last two: a damaged header
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
        if array.ndim not in (1, 2) or not len(array):
            raise UserError(f"{path}: an array of shape {array.shape}; wanted (rows,) or (rows, labels)")
        return pd.DataFrame(array)
    if not path.endswith((*CSV, ".parquet")):
        raise UserError(f"{path}: wanted a file that ends in .npy, .csv, .csv.gz or .parquet")
    csv: dict[str, Any] = {}
    if path.endswith(CSV):
        named = header and not _all_numbers(user_table(path, dtype=str, header=None, nrows=1).iloc[0].tolist())
        csv = {"header": 0, "dtype": dict.fromkeys(KEYS, str)} if named else {"header": None}
    frame = user_table(path, **csv)
    if "Unnamed: 0" in frame and frame["Unnamed: 0"].tolist() == list(range(len(frame))):
        frame = frame.drop(columns="Unnamed: 0")  # the index that pandas writes
    return frame if isinstance(frame.columns, pd.RangeIndex) else frame.rename(columns=str)


def _whole(path: str, frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    """Read the file without a header if its first line could be either (0, 1, ...) and a row is missing."""
    doubtful = path.endswith(CSV) and list(frame.columns) == [str(i) for i in range(frame.shape[1])]
    return _read(path, header=False) if doubtful and len(frame) == rows - 1 else frame


def _all_numbers(line: list[str]) -> bool:
    """Whether a first line is data: numbers, and not 0, 1, 2, ... (pandas' names of unnamed columns)."""
    try:
        [float(cell) for cell in line]
    except ValueError:
        return False
    names = line[1:] if pd.isna(line[0]) else line  # without the name of the index
    return names != [str(i) for i in range(len(names))]


def _is_key(frame: pd.DataFrame, column: str) -> bool:
    """Whether a named column identifies rows: it is neither a label nor a score."""
    values = ("label_", "logit_")
    if isinstance(frame.columns, pd.RangeIndex) or column.startswith(values):
        return False
    return (
        column in KEYS
        or any(str(other).startswith(values) for other in frame)
        or not pd.api.types.is_numeric_dtype(frame[column])
    )


def _values(path: str, frame: pd.DataFrame, kind: str, keys: Sequence[str]) -> pd.DataFrame:
    """The columns that hold labels or scores, as float64; logits of a run's predictions become probabilities."""
    own = [c for c in frame if str(c).startswith(kind)]
    kept = frame[own].rename(columns=lambda name: name.removeprefix(kind)) if own else frame
    kept = kept if own else frame.drop(columns=[c for c in frame if c in KEYS or c in keys])
    try:
        values = kept.astype(np.float64)
    except (ValueError, TypeError):  # their message contains the value, which may be a patient's
        raise UserError(f"{path}: not an array of numbers: {_no_number(kept)}; wanted numbers or empty cells") from None
    return pd.DataFrame(expit(values)) if own and kind == "logit_" else values


def _no_number(frame: pd.DataFrame) -> str:
    """The position of the first cell that is not a number."""
    found = frame.astype(str).apply(pd.to_numeric, errors="coerce").isna() & frame.notna()
    rows, columns = np.nonzero(found.to_numpy())
    if not len(rows):
        return "columns of " + ", ".join(sorted({str(kind) for kind in frame.dtypes}))
    return f"{len(rows)} cells are not numbers, the first in row {rows[0] + 1} of column `{frame.columns[columns[0]]}`"


def _order(labels: str, left: pd.DataFrame, other: str, right: pd.DataFrame, keys: Sequence[str]) -> np.ndarray:
    """Row numbers of `right` in the order of `left`, by all keys that both have; 7, 7.0 and 007 are equal.

    Raises: UserError: other rows, or rows in another order that the keys cannot tell apart.
    """
    number = {r"^\s*0*(\d+)(?:\.0+)?\s*$": r"\1"}
    a, b = (frame[list(keys)].astype("string").replace(number, regex=True).fillna("") for frame in (left, right))
    if not keys or a.reset_index(drop=True).equals(b.reset_index(drop=True)):
        return np.arange(len(right))
    by = ", ".join(f"`{key}`" for key in keys)
    for path, frame in ((labels, a), (other, b)):
        if (twice := frame.duplicated(keep=False)).any():
            raise UserError(
                f"{path}: {twice.sum()} rows share their {by} with another row, and {labels} and {other} differ in "
                "their order; add a key that is unique to both (dicom_id, sample_id, ...), or sort both alike"
            )
    place = pd.MultiIndex.from_frame(b).get_indexer(pd.MultiIndex.from_frame(a))
    if (place < 0).any():
        raise UserError(f"{other}: {(place < 0).sum()} of the rows of {labels} are not here, by {by}")
    return place


def _same_columns(y: pd.DataFrame, s: pd.DataFrame, labels: str, scores: str) -> pd.DataFrame:
    named = not isinstance(y.columns, pd.RangeIndex) and not isinstance(s.columns, pd.RangeIndex)
    if named and set(y) & set(s):
        if missing := [c for c in y if c not in s]:
            raise UserError(f"{scores}: no column `{missing[0]}` of {labels}; found {', '.join(map(str, s))}")
        return s[y.columns]
    if named and y.shape[1] == s.shape[1]:
        print(f"columns by position: {', '.join(f'{a} by {b}' for a, b in zip(y, s, strict=True))}")
    return s


def _groups(path: str, labels: str, left: pd.DataFrame) -> np.ndarray:
    """A subject for each row of `left`."""
    frame, rows = _read(path), len(left)
    if len(frame) == rows - 1 and path.endswith(CSV):
        frame = _read(path, header=False)
    if frame.shape[1] != 1 and "subject_id" not in frame:
        raise UserError(f"{path}: {frame.shape[1]} columns; wanted one, the subject of each row, or one `subject_id`")
    if len(frame) == rows:  # `evaluate` refuses other numbers of rows
        frame = frame.iloc[_order(labels, left, path, frame, [key for key in KEYS if key in left and key in frame])]
    return (frame["subject_id"] if "subject_id" in frame else frame.iloc[:, 0]).to_numpy()
