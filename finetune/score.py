"""`python -m finetune score LABELS SCORES`: metrics with intervals for any two arrays."""

from __future__ import annotations

import numpy as np
import pandas as pd

from configs import UserError
from ehr_features.files import new_file
from finetune.metrics import evaluate


def score(
    labels: str, scores: str, *, groups: str | None = None, samples: int = 1000, seed: int = 0, out: str | None = None
) -> pd.DataFrame:
    """Print the table, and write it to `out` as CSV if given.

    Args:
        labels: .npy, .csv or .parquet; rows x labels of 0, 1 and empty.
        scores: the same rows; columns are matched by name where both files name them, else by position.
        groups: a file of one column, a subject for each row.
    """
    y, s = _read(labels), _read(scores)
    if len(y) != len(s):
        raise UserError(f"{labels} has {len(y)} rows and {scores} {len(s)}; wanted the same rows in the same order")
    if not isinstance(y.columns, pd.RangeIndex) and not isinstance(s.columns, pd.RangeIndex):
        if missing := [c for c in y if c not in s]:
            raise UserError(f"{scores}: no column `{missing[0]}`; found {', '.join(map(str, s))}")
        s = s[y.columns]
    group = None
    if groups is not None:
        frame = _read(groups, text=True)
        if frame.shape[1] != 1:
            raise UserError(f"{groups}: {frame.shape[1]} columns; wanted one, the subject of each row")
        group = frame.iloc[:, 0].to_numpy()
    names = [str(c) for c in (s if isinstance(y.columns, pd.RangeIndex) else y).columns]
    table = evaluate(y.to_numpy(), s.to_numpy(), names=names, groups=group, samples=samples, seed=seed)
    shown = table.drop(columns="reason").round(4).astype(object).where(table.drop(columns="reason").notna(), "-")
    print(shown.assign(reason=table["reason"].fillna("")).to_string(index=False))
    if out is not None:
        with new_file(out) as part:
            table.to_csv(part, index=False)
        print(f"wrote {out}")
    return table


def _read(path: str, *, text: bool = False) -> pd.DataFrame:
    """A file as rows x columns; unnamed columns (.npy) are 0, 1, ..."""
    try:
        if path.endswith(".npy"):
            array = np.load(path, allow_pickle=False)
            frame = pd.DataFrame(array if array.ndim == 2 else array.reshape(len(array), -1))
        elif path.endswith(".parquet"):
            frame = pd.read_parquet(path)
        elif path.endswith((".csv", ".csv.gz")):
            frame = pd.read_csv(path)
        else:
            raise UserError(f"{path}: wanted a file that ends in .npy, .csv, .csv.gz or .parquet")
        if not len(frame):
            raise UserError(f"{path}: no rows")
        return frame if text else frame.astype(np.float64)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: not an array of numbers ({str(error).splitlines()[0]})") from None
