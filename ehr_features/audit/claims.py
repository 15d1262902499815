"""`ehr-msn audit FEATURES [RUN | NOTES ...]`: check for leaks, with counts.

Input: a features/ folder and the runs and notes made from it; or notes alone, whose config names their features.
Output: for each claim a line `proved`, `refuted` or `cannot be proved`; for notes also how well they predict each
finding. Exit 0 if all claims are proved, else 2.

Splits, film times, inputs and runs are checked on the written files, the series against the raw events (series.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from configs import UserError, first_line
from ehr_features import schema, static
from ehr_features.audit.events import COVERED, check_covered
from ehr_features.audit.films import (
    RECORD,
    SLACK_HOURS,
    STAYS,
    check_films,
    check_history,
    check_record,
    check_stay_films,
    check_stays,
)
from ehr_features.audit.last_values import IS_LAST, KNOWN_BEFORE, check_last
from ehr_features.audit.notes import audit_notes, is_notes, split_folders
from ehr_features.audit.people import PEOPLE, PRIOR, check_people, check_prior
from ehr_features.audit.runs import check_runs
from ehr_features.audit.series import DECLARED, FITTED, KNOWN, check_carried, check_known, check_series
from ehr_features.audit.series import READ as RAW_EVENTS
from ehr_features.audit.verdict import PROVED, UNKNOWN, Verdict, cannot, decide
from ehr_features.config import FeaturesConfig
from ehr_features.files import read_table
from ehr_features.progress import Bar
from ehr_features.raw.remote import fingerprint
from ehr_features.raw.source import Source, open_source
from ehr_features.schema import SPLITS
from ehr_features.series import channels
from ehr_features.typed import read_json, read_parquet, shapes

LABEL_GROUPS = ("finding", "phenotype", "outcome")
ORDER = ("study", "admission", "discharge")
RAW = (*RAW_EVENTS, "icustays")
AGAIN = "build the features again"
HOURS = "every sample is predicted at the hour of its task"
ENDS = "no sample is from after death, and remaining hours end with the stay"


def run(args: argparse.Namespace) -> int:
    """Print a verdict for each claim. Returns 0 if all are proved, else 2."""
    features, runs, notes = split_folders([args.features, *args.runs])
    verdicts = [] if is_notes(args.features) and not runs else audit(features, runs)
    tables = []
    for folder in notes:
        found, lines = audit_notes(folder, features)
        verdicts += found
        tables += [f"{folder}: {lines[0]}", *lines[1:]] if lines else []
    width = max(len(v.outcome) for v in verdicts)
    for verdict in verdicts:
        print(f"{verdict.outcome:{width}}  {verdict.claim}: {verdict.counts}")
    if tables:
        print("\n".join(["", *tables, ""]))
    bad = [v for v in verdicts if v.outcome != PROVED]
    if not bad:
        print(f"{args.features}: all {len(verdicts)} claims are proved")
        return 0
    open_ = sum(v.outcome == UNKNOWN for v in bad)
    print(f"{args.features}: {len(bad) - open_} claims refuted, {open_} cannot be proved, of {len(verdicts)}")
    return 2


def audit(features: Path, runs: list[Path]) -> list[Verdict]:
    """Check every claim. Raises: UserError: no features folder, or no run folder."""
    table = partial(read_table, features, values=False)
    stays = table("stays")
    films = (features / "images.parquet").is_file()
    images = table("images") if films else _no_images()
    ours, samples = read_json(features / "schema.json", shapes.SchemaJson), {}
    for path in sorted(features.glob("samples/*.parquet")):  # a user's own table may hold anything
        name = f"samples/{path.stem}"
        samples[path.stem] = table(name) if name in ours else read_parquet(path, {}, AGAIN, names=[], more=True)
    samples = {name: table for name, table in samples.items() if _has_ids(table)}
    subjects = pd.concat([t[["subject_id", "split"]] for t in (stays, images, *samples.values())])
    verdicts = [check_splits({"stays": stays, "images": images, **{f"samples/{n}": t for n, t in samples.items()}})]
    verdicts.append(check_films(stays, images, samples))
    if films:
        verdicts.append(check_stay_films(stays, images, table("stay_films")))
        verdicts.append(check_history(stays, images))
    verdicts.append(check_inputs(features))
    has_values = any(static.has(group, images.columns) for group in static.RECORD_GROUPS)
    of_films = (RECORD, PRIOR, *((KNOWN_BEFORE, IS_LAST) if has_values else ())) if films else ()
    try:
        config = _built_with(features)
    except UserError as error:
        unsaid = (HOURS, DECLARED, FITTED, KNOWN, COVERED, ENDS, STAYS, PEOPLE, *of_films)
        verdicts += [check_carried(features), *(cannot(claim, str(error)) for claim in unsaid)]
        return verdicts + check_runs(runs, subjects.drop_duplicates())
    verdicts.append(check_hours(stays, samples, config))
    verdicts += check_series(features, stays, config)
    try:
        source = _same_source(features, config)
    except UserError as error:
        unsaid = (KNOWN, COVERED, ENDS, STAYS, PEOPLE, *of_films)
        verdicts += [cannot(c, first_line(error)) for c in unsaid]
    else:
        checks: list[Callable[[], Verdict | Sequence[Verdict]]] = [
            lambda: check_known(features, source, config),
            lambda: check_covered(features, source, config),
            lambda: check_ends(source, samples, config),
            lambda: check_stays(source, stays, config),
            lambda: check_people(source, stays, images, samples.get("mortality"), config.preset),
        ]
        if films:
            checks += [lambda: check_record(source, images, config), lambda: check_prior(source, images)]
        if has_values:
            checks.append(lambda: check_last(source, images, config))
        with Bar("audit of the raw tables", len(checks), "claims", after=5) as bar:
            for check in checks:
                found = check()
                verdicts += [found] if isinstance(found, Verdict) else found
                bar.advance()
    return verdicts + check_runs(runs, subjects.drop_duplicates())


def _built_with(features: Path) -> FeaturesConfig:
    """The config of the build. Raises: UserError: it is missing or invalid."""
    try:
        config = FeaturesConfig(**read_json(features / "provenance.json", shapes.Provenance)["config"])
        channels.read_variables(config.channels)
        return config
    except (KeyError, TypeError, ValueError) as error:
        why = f"provenance.json has no valid config of the build ({first_line(error)})"
        raise UserError(why) from None


def _same_source(features: Path, config: FeaturesConfig) -> Source:
    """The raw tables. Raises: UserError: they changed since the build."""
    source = open_source(config)
    held = {one["table"]: one for one in read_json(features / "provenance.json", shapes.Provenance)["sources"].values()}
    for name in {*held, *RAW}:
        now = fingerprint(source.files[name]) if name in source.files else {}
        if not now or any(held.get(name, {}).get(key) != value for key, value in now.items()):
            raise UserError(f"{source.files.get(name, name)} is not the file from which the features were built")
    return source


def _has_ids(table: pd.DataFrame) -> bool:
    """Whether a table of samples has the columns to be checked; a user's own table may lack them."""
    ids = table.reindex(columns=["stay_id", "subject_id", "predict_at_hours"]).convert_dtypes()
    return {"split", "dicom_id"} <= set(table) and all(map(pd.api.types.is_numeric_dtype, ids.dtypes))


def check_hours(stays: pd.DataFrame, samples: dict[str, pd.DataFrame], config: FeaturesConfig) -> Verdict:
    """Each sample is predicted at the hour of its task, within its stay."""
    bad, rows = {}, 0
    for name, table in samples.items():
        timed = table.loc[table["predict_at_hours"].notna(), ["stay_id", "predict_at_hours"]].merge(
            stays[["stay_id", "los_hours"]], "left", "stay_id"
        )
        at, rows = timed["predict_at_hours"], rows + len(timed)
        late = ~(at <= timed["los_hours"] + 10 * SLACK_HOURS)
        if name in ("mortality", "phenotypes_early"):
            late |= at != config.landmark_hours
        bad[f"samples of {name} predicted at another hour"] = int(late.sum())
    return decide(HOURS, bad, f"{rows} samples with a prediction time")


def check_ends(source: Source, samples: dict[str, pd.DataFrame], config: FeaturesConfig) -> Verdict:
    """Hourly samples and labels end at death or outtime (with preset `medfuse` the remaining hours at outtime)."""
    stays = source.table("icustays").to_pandas().drop_duplicates("stay_id")
    deaths = source.table("admissions").to_pandas().groupby("subject_id")["deathtime"].min()
    died = (stays["subject_id"].map(deaths) - stays["intime"]).dt.total_seconds() / 3600
    los = (stays["outtime"] - stays["intime"]).dt.total_seconds() / 3600
    end = los if config.preset == "medfuse" else los.where(~(died < los), died)
    stays = stays[["stay_id"]].assign(died=died, end=end)
    after = beyond = missed = rows = 0
    for name in samples.keys() & {"mortality", "decompensation", "length_of_stay"}:
        table = samples[name].merge(stays, "left", "stay_id")
        left, dies = (table[c] - table["predict_at_hours"] for c in ("end", "died"))
        after, rows = after + int((dies < -SLACK_HOURS).sum()), rows + len(table)
        if name == "length_of_stay":
            beyond = int((table["los_remaining_hours"] > left + 10 * SLACK_HOURS).sum())
        if name == "decompensation":
            missed = int((dies.between(SLACK_HOURS, 24) & (table["decompensation"] != 1)).sum())
    bad = {
        "samples from after death": after,
        "remaining hours beyond the end of the stay": beyond,
        "samples of the last 24 hours of life without decompensation": missed,
    }
    return decide(ENDS, bad, f"{rows} samples")


def _no_images() -> pd.DataFrame:
    types = {"string": "str", "timestamp": "datetime64[us]"}
    return pd.DataFrame({c: pd.Series(dtype=types.get(s.type, s.type)) for c, s in schema.IMAGES.items()})


def check_splits(tables: dict[str, pd.DataFrame]) -> Verdict:
    """No subject is in two splits, over all tables."""
    both = pd.concat([t[["subject_id", "split"]] for t in tables.values()]).drop_duplicates()
    bad = {
        "subjects in two splits": int(both["subject_id"].duplicated().sum()),
        "subjects in no split": int((~both["split"].isin(SPLITS)).sum()),
    }
    sizes = " / ".join(f"{(both['split'] == s).sum()} {s}" for s in SPLITS)
    proof = f"{both['subject_id'].nunique()} subjects in {len(tables)} tables, {sizes}"
    return decide("no subject is in two splits", bad, proof)


def check_inputs(features: Path) -> Verdict:
    """No label is among the input columns, and no column is declared as known earlier than it is."""
    described = read_json(features / "schema.json", shapes.SchemaJson)
    ours = {"stays": schema.STAYS, "images": schema.IMAGES, "stay_films": schema.STAY_FILMS}
    early = moved = unknown = undeclared = columns = 0
    foreign = []
    labels = set(schema.FINDINGS)
    for table, said in described.items():
        known = ours.get(table, schema.SAMPLES)
        columns += len(said)
        labels |= {c for c, about in said.items() if about["group"] in LABEL_GROUPS}
        for name, about in said.items():
            if name in known:
                moved += about["group"] != known[name].group
                early += ORDER.index(about["available_at"]) < ORDER.index(known[name].available_at)
            elif table == "images":  # a column of channels.yaml
                moved += not name.startswith(f"{about['group']}_") or about["group"] not in static.RECORD_GROUPS
            else:  # label of a task
                unknown += about["group"] not in LABEL_GROUPS
    for path in sorted(features.rglob("*.parquet")):
        table = path.relative_to(features).with_suffix("").as_posix()
        said, held = set(described.get(table, {})), set(pq.read_schema(path).names)
        if table.startswith("samples/"):
            foreign += [f"{table}.{name}" for name in sorted(held - said)]
            undeclared += len(said - held)
        else:
            undeclared += len(said ^ held)
    series = read_json(features / "series.json", shapes.Series)["columns"]
    bad = {
        "labels among the columns of the series": len(labels & {c.removeprefix("mask->") for c in series}),
        "columns declared as known earlier than they are": int(early),
        "columns declared with the wrong group": int(moved),
        "columns that are neither declared nor labels of a task": int(unknown),
        "columns that are only in a table or only in schema.json": undeclared,
    }
    late = {c for said in described.values() for c, about in said.items() if about["available_at"] == "discharge"}
    listed = ", ".join(sorted(late - labels))
    proof = f"{len(series)} series columns, {columns} table columns; known at discharge: {listed}"
    if foreign:
        proof += f"; not written by this toolkit, not checked: {', '.join(foreign)}"
    return decide("no finding, phenotype or outcome is among the inputs", bad, proof)
