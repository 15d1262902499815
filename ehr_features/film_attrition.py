"""Which films found no admission, ICU stay, emergency visit or image file, and why.

Comes in: linked films. Goes out: entries of attrition.json. No film leaves images.parquet for these reasons.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import ibis
import pyarrow as pa
from ibis import _

if TYPE_CHECKING:
    from ehr_features.cohort import Attrition

NAMES = {"hadm_id": "hospital admission", "stay_id": "ICU stay", "ed_stay_id": "emergency visit"}
READERS, SIZE = 16, 1000  # threads that look for files, and files that each looks for at once


def note_links(linked: ibis.Table, intervals: Mapping[str, ibis.Table], attrition: Attrition) -> None:
    """Say for each kind of link which films have none, and which had several to choose from.

    Args:
        linked: dicom_id, subject_id, taken_at, and KEY, KEY_candidates of each kind.
        intervals: KEY -> subject_id, KEY, start, end: what there was to be linked to.
    """
    for key, spans in intervals.items():
        name, article = NAMES[key], "a" if key == "hadm_id" else "an"
        table = f"films with a link to {article} {name}"
        known = spans.filter(_.end >= _.start).select("subject_id").distinct().mutate(known=ibis.literal(True))
        rows = linked.left_join(known, "subject_id").select(
            "dicom_id",
            timed=_.taken_at.notnull(),
            known=_.known.fill_null(False),
            linked=_[key].notnull(),
            several=(_[f"{key}_candidates"] > 1).fill_null(False),
        )
        films = rows.to_pyarrow()
        ids = films["dicom_id"]
        timed, known_, linked_, several = (films[c].to_numpy() for c in ("timed", "known", "linked", "several"))
        left = len(films)
        for why, gone in (
            ("no time of its own", ~timed),
            (f"the subject has no {name}", timed & ~known_),
            (f"taken outside of every {name} of the subject", timed & known_ & ~linked_),
        ):
            num = int(gone.sum())
            attrition.add(table, why, left, left - num, ids.filter(pa.array(gone)).to_pylist())
            left -= num
        why = f"ambiguous: several {name}s fit equally; the one that began last is taken"
        attrition.add(table, why, left, left, ids.filter(pa.array(several)).to_pylist())


def note_files(films: ibis.Table, root: str, attrition: Attrition) -> None:
    """Say which films have no image file below `root`; not where `root` is a URL or holds no files/."""
    folder = Path(root.removeprefix("file://"))
    if "://" in str(folder) or not (folder / "files").is_dir():
        attrition.note("image files", f"not looked for: no folder files/ in {root}")
        return
    rows = films.select("dicom_id", "path").to_pyarrow()
    paths = rows["path"].to_pylist()

    def absent(start: int) -> list[int]:
        return [k for k in range(start, min(start + SIZE, len(paths))) if not os.path.exists(folder / paths[k])]

    with ThreadPoolExecutor(READERS) as pool:
        gone = [rows["dicom_id"][k].as_py() for part in pool.map(absent, range(0, len(paths), SIZE)) for k in part]
    why = "missing file: there is no such image file below mimic_cxr"
    attrition.add("films with an image file", why, len(paths), len(paths) - len(gone), gone)
