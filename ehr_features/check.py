"""Open every table and report its size and what can be done with it; nothing is extracted.

Large CSV files are not read to the end: their row count is estimated from the first megabytes and marked `about`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

import fsspec

from configs import UserError
from ehr_features.config import FeaturesConfig
from ehr_features.phenotypes import lost_zeros
from ehr_features.raw.engine import named_by_the_engine, read, readable
from ehr_features.raw.remote import fingerprint
from ehr_features.raw.source import Source, check_columns, check_zones, mixed, open_source, roots, without_ids
from ehr_features.schema import READ
from ehr_features.series import channels, coverage

COUNTED = 30_000_000  # bytes; a larger CSV file's rows are estimated
SAMPLED = 4_000_000
STEPS = {  # step: (tables it needs, what is lost without them)
    "stays": (("patients", "admissions", "icustays"), "nothing can be built"),
    "series": (("chartevents", "labevents", "d_items", "d_labitems"), "nothing can be built"),
    "phenotypes": (
        ("diagnoses_icd",),
        "leave phenotypes out of tasks; the group prior_diagnoses has only the number of admissions",
    ),
    "films": (("cxr_metadata",), "no images.parquet, no stay_films.parquet, dicom_id empty in every sample"),
    "findings": (("cxr_metadata", "cxr_chexpert"), "the finding columns are empty, and no task `findings`"),
    "official film split": (("cxr_split",), "official val / test subjects are unknown, and there is no split=official"),
    "emergency stays": (("edstays",), "ed_stay_id and hours_since_ed_arrival are empty"),
    "triage": (("edstays", "triage"), "the group ed_triage is all missing"),
    "record before films": (
        ("cxr_metadata", "chartevents", "labevents"),
        "the groups vitals and labs are absent",
    ),
    "emergency vital signs": (("vitalsign",), "the group vitals has no values of emergency visits"),
    "then pretrain": (("cxr_metadata",), "there are no films to learn from"),
    "then probe": (("cxr_metadata", "cxr_chexpert"), "no labels of MIMIC-CXR; tables of other data sets can be used"),
    "then fuse": (("cxr_metadata",), "only record-only models (model=record_lstm)"),
}
NEEDED = {
    "stays": None,
    "series": None,
    "phenotypes": "phenotypes",
    "findings": "findings",
}  # by every build; by a task


@named_by_the_engine()
def check(config: FeaturesConfig) -> int:
    """Print the report. Returns: 0 if `build` has what it needs, else 2."""
    source = open_source(config)
    faults: dict[str, str] = {}
    rows: dict[str, int] = {}
    print(f"layout of {config.mimic_iv}: MIMIC-IV {source.layout}{' to 3.1' if source.layout == '2.2' else ''}")
    print(f"{'table':<14}{'rows':>16}  {'columns':>7}  {'size':>9}  file")
    for name, path in source.files.items():
        size = int(fingerprint(path)["bytes"] or 0)
        try:
            check_columns(name, path, source.columns[name], source.layout)
            check_zones(name, path)
            counted, exact = num_rows(source, name, size)
        except UserError as error:
            faults[name], counted, exact = str(error), 0, False
        if exact:
            rows[name] = counted
        told = "?" if name in faults else f"{'' if exact else 'about '}{counted:,}"
        print(f"{name:<14}{told:>16}  {len(source.columns[name]):>7}  {_size(size):>9}  {path}")
    known, warnings = releases(roots(config), rows, source.layout)
    for root, found in known.items():
        by = " (by the folder's name)" if found["claimed"] else " (by row counts)" if found["release"] else ""
        print(f"release of {root}: {found['release'] or 'unknown'}{by}")
    if not {"diagnoses_icd", "d_icd_diagnoses"} & faults.keys():
        warnings += lost_zeros(source)
    for warning in warnings + mixed(source.columns) + dropped_rows(source):
        print(f"warning: {warning}")
    for fault in faults.values():
        print(f"fault: {fault}")
    _links(source, faults)
    if not {"d_items", "d_labitems"} & faults.keys() and source.has("d_items") and source.has("d_labitems"):
        declared, every = channels.read_channels(config.channels), channels.read_variables(config.channels)
        if absent := channels.check_items(source, every, config.preset, config.channels):
            print(f"itemids of channels.yaml that this release's dictionaries lack: {absent}")
        if not {"chartevents", "icustays"} & faults.keys() and source.has("chartevents") and source.has("icustays"):
            seen = coverage.look(source, declared, config.preset)
            print(seen.words)
            for kind, said in (("warning", seen.warnings), ("fault", seen.faults)):
                for line in said:
                    print(f"{kind}: {line}")
            faults |= dict.fromkeys(["chartevents"] if seen.faults else [], "")
    return _steps(source, config, faults)


def num_rows(source: Source, name: str, size: int) -> tuple[int, bool]:
    """Rows of a table, and whether they were counted (else estimated)."""
    path = source.files[name]
    with readable(path):
        if size <= COUNTED:
            return source.rows(name), True
        if path.endswith(".parquet"):
            return int(read(source.con, path).count().execute()), True
        with fsspec.open(path, "rb") as file:
            head = file.read(SAMPLED)
    text = zlib.decompressobj(wbits=31).decompress(head) if path.endswith(".gz") else head
    return int(round(text.count(b"\n") * size / len(head), -3)), False


def _links(source: Source, faults: dict[str, str]) -> None:
    """Print how many films belong to subjects with a record."""
    if not source.has("cxr_metadata") or {"cxr_metadata", "patients"} & faults.keys():
        return
    films = source.table("cxr_metadata")
    own = films.semi_join(source.table("patients"), "subject_id")
    n, known = int(films.count().execute()), int(own.count().execute())
    print(
        f"films: {n:,} of {int(films.subject_id.nunique().execute()):,} subjects; {known:,} of subjects with a record"
    )


def _steps(source: Source, config: FeaturesConfig, faults: dict[str, str]) -> int:
    usable = 0
    for step, (tables, lost) in STEPS.items():
        missing = [name for name in tables if not source.has(name) or name in faults]
        state = "faulty" if set(missing) & faults.keys() else "absent"
        print(f"{step:<22}" + (f"no: {', '.join(missing)} {state}; {lost}" if missing else "yes"))
        task = NEEDED.get(step)
        wanted = step in NEEDED and (task is None or any(t.startswith(task) for t in config.tasks))
        usable = 2 if missing and wanted else usable
    print(f"{'then images':<22}{_films_on_disk(config.mimic_cxr)}")
    if config.split == "official" and not source.has("cxr_split"):
        print("split=official        no: cxr_split absent; take split=hash")
        usable = 2
    unread = sorted(set(READ) - set(source.files))
    if unread:
        print(f"tables not found: {', '.join(unread)}")
    return usable


def _films_on_disk(root: str | None) -> str:
    if root is None:
        return "no: no mimic_cxr; for other films set films=FOLDER"
    filesystem, inner = fsspec.url_to_fs(f"{root.rstrip('/')}/files")
    return "yes" if filesystem.isdir(inner) else f"no: {root} has no folder files/; the tables contain no films"


def _size(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"


# ---- The release of the tables, and whether their row counts are the known ones.


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
    """The release, or `A or B`, whose known row counts match all tables that have one."""
    known = {name: READ[name].rows for name in rows if READ[name].root == root}
    shared = {r: [name for name, counts in known.items() if r in counts] for counts in known.values() for r in counts}
    fits = sorted(r for r, names in shared.items() if all(known[name][r] == rows[name] for name in names))
    return " or ".join(fits) or None


def dropped_rows(source: Source) -> list[str]:
    """A warning for each counted table of which rows were dropped because an id is missing."""
    return [
        f"{source.files.get(name, name)}: {n:,} rows dropped: {without_ids(name)} (an empty row, a repeated header, an "
        "id that is no whole number)"
        for name, n in source.dropped.items()
        if n
    ]


def releases(
    roots: Mapping[str, str | None], rows: Mapping[str, int], layout: str
) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """The release of each folder of a config, as far as known.

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
    """A warning for each table whose row count differs from that of the claimed release."""
    out = []
    for name, count in rows.items():
        wanted = READ[name].rows.get(release or "") if READ[name].root == root else None
        if wanted is not None and wanted != count:
            more = f"{abs(count - wanted):,} {'more' if count > wanted else 'fewer'}"
            out.append(f"{name}: {count:,} rows, {more} than the {wanted:,} of release {release}; is it whole?")
    return out
