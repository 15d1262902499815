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
    """The release whose known row counts are those of every table at hand that has one."""
    known = {name: READ[name].rows for name in rows if READ[name].root == root}
    releases = {release for counts in known.values() for release in counts}
    for release in sorted(releases):
        shared = [name for name, counts in known.items() if release in counts]
        if shared and all(known[name][release] == rows[name] for name in shared):
            return release
    return None


def differences(rows: Mapping[str, int], release: str | None, root: str = "mimic_iv") -> list[str]:
    """A warning for each table whose count is not that of the claimed release."""
    out = []
    for name, count in rows.items():
        wanted = READ[name].rows.get(release or "") if READ[name].root == root else None
        if wanted is not None and wanted != count:
            more = f"{abs(count - wanted):,} {'more' if count > wanted else 'fewer'}"
            out.append(f"{name}: {count:,} rows, {more} than the {wanted:,} of release {release}; is it whole?")
    return out
