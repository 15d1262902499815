"""Which release the tables are of, and whether their row counts are the known ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ehr_features.schema import READ


def claimed(root: str) -> str | None:
    """The release that a folder's name claims: `demo`, `2.2`, ... (None: it names none)."""
    names = root.rstrip("/").lower().split("/")
    name = names[-1] if "mimic" in names[-1] else "/".join(names[-2:])
    if not re.search(r"mimic|physionet|^(.*/)?v?\d\.\d", name):
        return None
    if re.search(r"mimic[^/]*demo", name):
        return "demo"
    found = re.search(r"(?<![\d.])(\d\.\d(?:\.\d)?)(?![\d.])", name)
    return found.group(1) if found else None


def recognised(rows: Mapping[str, int], root: str = "mimic_iv") -> str | None:
    """The release, or `A or B`, whose known row counts are those of every table at hand that has one."""
    known = {name: READ[name].rows for name in rows if READ[name].root == root}
    shared = {r: [name for name, counts in known.items() if r in counts] for counts in known.values() for r in counts}
    fits = sorted(r for r, names in shared.items() if all(known[name][r] == rows[name] for name in names))
    return " or ".join(fits) or None


def told(
    roots: Mapping[str, str | None], rows: Mapping[str, int], layout: str
) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """What is known of the release of each folder of a config.

    Args:
        roots: mimic_iv, mimic_ed, mimic_cxr -> folder or URL. rows: of the counted tables. layout: of mimic_iv.
    Returns: root -> claimed (by the folder's name), release (claimed, else by row counts); and warnings.
    """
    found: dict[str, dict[str, str | None]] = {}
    warnings = []
    for root, folder in roots.items():
        if folder is None:
            continue
        said = claimed(folder)
        found[root] = {"claimed": said, "release": said or recognised(rows, root)}
        warnings += differences(rows, said, root)
        if root == "mimic_iv" and said and said != "demo" and said.startswith("1.") != (layout == "1.0"):
            warnings.append(f"{folder}: named {said}, but its tables are laid out as in {layout}; is the name right?")
    return found, warnings


def differences(rows: Mapping[str, int], release: str | None, root: str = "mimic_iv") -> list[str]:
    """A warning for each table whose count is not that of the claimed release."""
    out = []
    for name, count in rows.items():
        wanted = READ[name].rows.get(release or "") if READ[name].root == root else None
        if wanted is not None and wanted != count:
            more = f"{abs(count - wanted):,} {'more' if count > wanted else 'fewer'}"
            out.append(f"{name}: {count:,} rows, {more} than the {wanted:,} of release {release}; is it whole?")
    return out
