"""`ehr-msn audit FEATURES [RUN | NOTES ...]`: does anything leak? Proved or refuted, with counts.

Comes in: a features/ folder and the runs and notes that were made from it; or notes alone, which name their features.
Goes out: a line for each claim, `proved`, `refuted` or `cannot be proved`, and for notes how much of each finding they
tell. Exit 0 if all are proved, 2 otherwise.

Splits, film times, inputs and runs are checked on what was written, the series against the raw events
(audit_series.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from configs import UserError
from ehr_features import schema
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
from ehr_features.audit.notes import audit_notes, is_notes, split_folders
from ehr_features.audit.people import PEOPLE, PRIOR, check_people, check_prior
from ehr_features.audit.runs import check_runs
from ehr_features.audit.series import DECLARED, FITTED, KNOWN, check_carried, check_known, check_series
from ehr_features.audit.series import READ as RAW_EVENTS
from ehr_features.audit.verdict import PROVED, UNKNOWN, Verdict, cannot, decide
from ehr_features.config import FeaturesConfig
from ehr_features.files import read_json, read_table
from ehr_features.raw.remote import fingerprint
from ehr_features.raw.source import Source, open_source
from ehr_features.schema import SPLITS
from ehr_features.series import channels

LABEL_GROUPS = ("finding", "phenotype", "outcome")
ORDER = ("study", "admission", "discharge")
RAW = (*RAW_EVENTS, "icustays")
HOURS = "samples are predicted when their task says"
ENDS = "no sample is from after death, and what remains of a stay ends there"


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
    stays = read_table(features, "stays")
    films = (features / "images.parquet").is_file()
    images = read_table(features, "images") if films else _no_images()
    samples = {p.stem: read_table(features, f"samples/{p.stem}") for p in sorted(features.glob("samples/*.parquet"))}
    samples = {name: table for name, table in samples.items() if _has_ids(table)}
    subjects = pd.concat([t[["subject_id", "split"]] for t in (stays, images, *samples.values())])
    verdicts = [check_splits({"stays": stays, "images": images, **{f"samples/{n}": t for n, t in samples.items()}})]
    verdicts.append(check_films(stays, images, samples))
    if films:
        verdicts.append(check_stay_films(stays, images, read_table(features, "stay_films")))
        verdicts.append(check_history(stays, images))
    verdicts.append(check_inputs(features))
    try:
        config = _built_with(features)
    except UserError as error:
        unsaid = (HOURS, DECLARED, FITTED, KNOWN, COVERED, ENDS, STAYS, PEOPLE, *((RECORD, PRIOR) if films else ()))
        verdicts += [check_carried(features), *(cannot(claim, str(error)) for claim in unsaid)]
        return verdicts + check_runs(runs, subjects.drop_duplicates())
    verdicts.append(check_hours(stays, samples, config))
    verdicts += check_series(features, stays, config)
    try:
        source = _same_source(features, config)
    except UserError as error:
        unsaid = (KNOWN, COVERED, ENDS, STAYS, PEOPLE, *((RECORD, PRIOR) if films else ()))
        verdicts += [cannot(c, str(error).splitlines()[0]) for c in unsaid]
    else:
        verdicts += [check_known(features, source, config), check_covered(features, source, config)]
        verdicts.append(check_ends(source, samples, config))
        verdicts.append(check_stays(source, stays, config))
        verdicts.append(check_people(source, stays, images, samples.get("mortality"), config.preset))
        verdicts += [check_record(source, images, config), check_prior(source, images)] if films else []
    return verdicts + check_runs(runs, subjects.drop_duplicates())


def _built_with(features: Path) -> FeaturesConfig:
    """The config that a folder was built with. Raises: UserError: it is not said, or not valid."""
    try:
        config = FeaturesConfig(**read_json(features / "provenance.json")["config"])
        channels.read_channels(config.channels)
        return config
    except (KeyError, TypeError, ValueError) as error:
        why = f"provenance.json does not say how the folder was built ({str(error).splitlines()[0]})"
        raise UserError(why) from None


def _same_source(features: Path, config: FeaturesConfig) -> Source:
    """The raw tables, if they are still those of the build. Raises: UserError: they are not."""
    source = open_source(config)
    held = {one["table"]: one for one in read_json(features / "provenance.json")["sources"].values()}
    for name in {*held, *RAW}:
        now = fingerprint(source.files[name]) if name in source.files else {}
        if not now or any(held.get(name, {}).get(key) != value for key, value in now.items()):
            raise UserError(f"{source.files.get(name, name)} is not the file that the features were built from")
    return source


def _has_ids(table: pd.DataFrame) -> bool:
    """Whether a table of samples can be held against stays and films; a user's own may lack the columns for it."""
    ids = table.reindex(columns=["stay_id", "subject_id", "predict_at_hours"]).convert_dtypes()
    return {"split", "dicom_id"} <= set(table) and all(map(pd.api.types.is_numeric_dtype, ids.dtypes))


def check_hours(stays: pd.DataFrame, samples: dict[str, pd.DataFrame], config: FeaturesConfig) -> Verdict:
    """Each sample is predicted when its task says, and while its stay lasts."""
    bad, rows = {}, 0
    for name, table in samples.items():
        timed = table.loc[table["predict_at_hours"].notna(), ["stay_id", "predict_at_hours"]].merge(
            stays[["stay_id", "los_hours"]], "left", "stay_id"
        )
        at, rows = timed["predict_at_hours"], rows + len(timed)
        late = ~(at <= timed["los_hours"] + 10 * SLACK_HOURS)
        if name in ("mortality", "phenotypes_early"):
            late |= at != config.landmark_hours
        bad[f"samples of {name} that are predicted at another hour"] = int(late.sum())
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
        "hours that remain beyond the end of the stay": beyond,
        "samples of the last day of life without decompensation": missed,
    }
    return decide(ENDS, bad, f"{rows} samples")


def _no_images() -> pd.DataFrame:
    types = {"string": "str", "timestamp": "datetime64[us]"}
    return pd.DataFrame({c: pd.Series(dtype=types.get(s.type, s.type)) for c, s in schema.IMAGES.items()})


def check_splits(tables: dict[str, pd.DataFrame]) -> Verdict:
    """No subject in two splits, in all tables together."""
    both = pd.concat([t[["subject_id", "split"]] for t in tables.values()]).drop_duplicates()
    bad = {
        "subjects in two splits": int(both["subject_id"].duplicated().sum()),
        "subjects in no split": int((~both["split"].isin(SPLITS)).sum()),
    }
    sizes = " / ".join(f"{(both['split'] == s).sum()} {s}" for s in SPLITS)
    proof = f"{both['subject_id'].nunique()} subjects in {len(tables)} tables, {sizes}"
    return decide("no subject is in two splits", bad, proof)


def check_inputs(features: Path) -> Verdict:
    """No label among the columns that models read, and no column said to be known earlier than it is."""
    described = read_json(features / "schema.json")
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
            else:  # a label of a task
                unknown += about["group"] not in LABEL_GROUPS
    for path in sorted(features.rglob("*.parquet")):
        table = path.relative_to(features).with_suffix("").as_posix()
        said, held = set(described.get(table, {})), set(pq.read_schema(path).names)
        if table.startswith("samples/"):
            foreign += [f"{table}.{name}" for name in sorted(held - said)]
            undeclared += len(said - held)
        else:
            undeclared += len(said ^ held)
    series = read_json(features / "series.json")["columns"]
    bad = {
        "labels among the columns of the series": len(labels & {c.removeprefix("mask->") for c in series}),
        "columns said to be known earlier than they are": int(early),
        "columns said to be of another group than they are": int(moved),
        "columns that are neither declared nor labels of a task": int(unknown),
        "columns of the tables that schema.json does not have, or has alone": undeclared,
    }
    late = {c for said in described.values() for c, about in said.items() if about["available_at"] == "discharge"}
    listed = ", ".join(sorted(late - labels))
    proof = f"{len(series)} series columns, {columns} table columns; known at discharge: {listed}"
    if foreign:
        proof += f"; not written by this toolkit and not judged: {', '.join(foreign)}"
    return decide("no finding, phenotype or outcome is among the inputs", bad, proof)
