"""`ehr-msn audit FEATURES [RUN | NOTES ...]`: check for leaks, with counts.

Input: a features/ folder and the runs and notes made from it; or notes alone, whose config names their features.
Output: for each claim a line `proved`, `refuted` or `cannot be proved`; for notes also how well they predict each
finding. Exit 0 if all claims are proved, else 2.

Splits, film times, inputs and runs are checked on the written files, the series against the raw events (series.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
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
from ehr_features.audit.written import Written, quoted
from ehr_features.config import LEAST_MB, FeaturesConfig, megabytes
from ehr_features.progress import Bar
from ehr_features.raw.engine import named_by_the_engine
from ehr_features.raw.remote import fingerprint
from ehr_features.raw.source import Source, open_source
from ehr_features.schema import SPLITS
from ehr_features.series import channels
from ehr_features.typed import read_json, shapes

LABEL_GROUPS = ("finding", "phenotype", "outcome")
ORDER = ("study", "admission", "discharge")
RAW = (*RAW_EVENTS, "icustays")
SPLIT = "SELECT DISTINCT subject_id, split FROM {view}"
PREDICTED = """
WITH timed AS (
    SELECT s.predict_at_hours::DOUBLE AS hour, t.los_hours FROM {view} s LEFT JOIN stays t USING (stay_id)
    WHERE s.predict_at_hours IS NOT NULL AND NOT isnan(s.predict_at_hours::DOUBLE))
SELECT count(*), count(*) FILTER (NOT coalesce(hour <= los_hours + {slack}, false) {other}) FROM timed
"""
LAST_HOURS = """
CREATE OR REPLACE TEMP TABLE last_hours AS
WITH deaths AS (SELECT subject_id, min(deathtime) AS at FROM admissions GROUP BY ALL),
spans AS (
    SELECT s.stay_id, any_value((epoch(d.at) - epoch(s.intime)) / 3600) AS died,
        any_value((epoch(s.outtime) - epoch(s.intime)) / 3600) AS los
    FROM icustays s LEFT JOIN deaths d USING (subject_id) GROUP BY ALL)
SELECT stay_id, died, {end} AS end_ FROM spans
"""
LATE = """
SELECT count(*) FILTER (e.died - s.predict_at_hours < -{slack}), count(*)
FROM {view} s LEFT JOIN last_hours e USING (stay_id)
"""
BEYOND = """
SELECT count(*) FROM "samples/length_of_stay" s JOIN last_hours e USING (stay_id)
WHERE s.los_remaining_hours > e.end_ - s.predict_at_hours + {slack}
"""
MISSED = """
SELECT count(*) FROM "samples/decompensation" s JOIN last_hours e USING (stay_id)
WHERE e.died - s.predict_at_hours BETWEEN {slack} AND 24 AND NOT coalesce(s.decompensation = 1, false)
"""
HOURS = "every sample is predicted at the hour of its task"
ENDS = "no sample is from after death, and remaining hours end with the stay"


def run(args: argparse.Namespace) -> int:
    """Print a verdict for each claim. Returns 0 if all are proved, else 2."""
    features, runs, notes = split_folders([args.features, *args.runs])
    verdicts = [] if is_notes(args.features) and not runs else audit(features, runs, args.memory)
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


@named_by_the_engine()
def audit(features: Path, runs: list[Path], memory: str | None = None) -> list[Verdict]:
    """Check every claim.

    Args:
        memory: limit of the engine, such as 4GB; that of the build if None.
    Raises: UserError: no features folder, or no run folder.
    """
    memory = memory or _memory(features)
    written = Written(features, memory)
    films = written.films
    splits = {name: written.frame(SPLIT.format(view=quoted(name))) for name in ("stays", "images")}
    splits |= {f"samples/{t}": written.frame(SPLIT.format(view=quoted(f"samples/{t}"))) for t in written.tasks}
    subjects = pd.concat(splits.values()).drop_duplicates()
    verdicts = [check_splits(splits), check_films(written)]
    if films:
        verdicts += [check_stay_films(written), check_history(written)]
    verdicts.append(check_inputs(features))
    has_values = films and any(static.has(group, written.columns["images"]) for group in static.RECORD_GROUPS)
    of_films = (RECORD, PRIOR, *((KNOWN_BEFORE, IS_LAST) if has_values else ())) if films else ()
    try:
        config = _built_with(features)
    except UserError as error:
        unsaid = (HOURS, DECLARED, FITTED, KNOWN, COVERED, ENDS, STAYS, PEOPLE, *of_films)
        verdicts += [check_carried(features), *(cannot(claim, str(error)) for claim in unsaid)]
        return verdicts + check_runs(runs, subjects)
    verdicts.append(check_hours(written, config))
    verdicts += check_series(features, written.frame("SELECT stay_id, split FROM stays"), config)
    try:
        source = _same_source(features, config.model_copy(update={"memory": memory}))
    except UserError as error:
        unsaid = (KNOWN, COVERED, ENDS, STAYS, PEOPLE, *of_films)
        verdicts += [cannot(c, first_line(error)) for c in unsaid]
    else:
        written.beside(source)
        checks: list[Callable[[], Verdict | Sequence[Verdict]]] = [
            lambda: check_known(features, source, config),
            lambda: check_covered(features, source, config),
            lambda: check_ends(source, written, config),
            lambda: check_stays(source, written, config),
            lambda: check_people(source, written, config.preset),
        ]
        if films:
            checks += [lambda: check_record(source, written, config), lambda: check_prior(source, written)]
        if has_values:
            checks.append(lambda: check_last(source, written, config))
        with Bar("audit of the raw tables", len(checks), "claims", after=5) as bar:
            for check in checks:
                found = check()
                verdicts += [found] if isinstance(found, Verdict) else found
                bar.advance()
    return verdicts + check_runs(runs, subjects)


def _memory(features: Path) -> str:
    """The limit of the build."""
    try:
        return _built_with(features).memory
    except UserError:
        return FeaturesConfig.model_fields["memory"].default


def _built_with(features: Path) -> FeaturesConfig:
    """The config of the build. Raises: UserError: it is missing or invalid."""
    try:
        given = dict(read_json(features / "provenance.json", shapes.Provenance)["config"])
        if "memory" in given and megabytes(given["memory"]) < LEAST_MB:  # of an earlier release
            given["memory"] = f"{LEAST_MB}MB"
        config = FeaturesConfig(**given)
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


def check_hours(written: Written, config: FeaturesConfig) -> Verdict:
    """Each sample is predicted at the hour of its task, within its stay."""
    bad, rows = {}, 0
    for task in written.tasks:
        other = f"OR hour != {config.landmark_hours}" if task in ("mortality", "phenotypes_early") else ""
        more, late = written.numbers(
            PREDICTED.format(view=quoted(f"samples/{task}"), slack=10 * SLACK_HOURS, other=other)
        )
        rows, bad[f"samples of {task} predicted at another hour"] = rows + more, late
    return decide(HOURS, bad, f"{rows} samples with a prediction time")


def check_ends(source: Source, written: Written, config: FeaturesConfig) -> Verdict:
    """Hourly samples and labels end at death or outtime (with preset `medfuse` the remaining hours at outtime)."""
    written.view(source, "icustays", "stay_id", "subject_id", "intime", "outtime")
    written.view(source, "admissions", "subject_id", "deathtime")
    end = "los" if config.preset == "medfuse" else "CASE WHEN died < los THEN died ELSE los END"
    written.con.execute(LAST_HOURS.format(end=end))
    after = rows = 0
    for task in sorted({"mortality", "decompensation", "length_of_stay"} & set(written.tasks)):
        late, more = written.numbers(LATE.format(view=quoted(f"samples/{task}"), slack=SLACK_HOURS))
        after, rows = after + late, rows + more
    beyond = missed = 0
    if "length_of_stay" in written.tasks:
        (beyond,) = written.numbers(BEYOND.format(slack=10 * SLACK_HOURS))
    if "decompensation" in written.tasks:
        (missed,) = written.numbers(MISSED.format(slack=SLACK_HOURS))
    bad = {
        "samples from after death": after,
        "remaining hours beyond the end of the stay": beyond,
        "samples of the last 24 hours of life without decompensation": missed,
    }
    return decide(ENDS, bad, f"{rows} samples")


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
