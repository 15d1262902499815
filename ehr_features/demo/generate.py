"""A synthetic MIMIC with a planted signal: real schemas, drawn films, and the best AUROC that the generator allows.

Writes OUT/mimic-iv/{hosp,icu}, OUT/mimic-iv-ed/ed, OUT/mimic-cxr, OUT/truth.json, and, for tests, truth.parquet (a row
per ICU stay: latents and true probabilities) and truth_films.parquet (a row per film: what was drawn). No step of the
pipeline reads the truth. truth.py defines what the Bayes-optimal values condition on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from configs import UserError
from configs.commands import command_line
from ehr_features.demo.cxr import best_auroc, drawing, write_cxr
from ehr_features.demo.events import write_events
from ehr_features.demo.people import People, people
from ehr_features.demo.plan import Plan, age_and_sex, hours_between
from ehr_features.demo.record_link import NO_SOURCE, VALUES, stay_likelihood, strength
from ehr_features.demo.tables import write_hosp, write_icu
from ehr_features.demo.truth import NAMES, PHENOTYPES, Outcomes, auroc, sigmoid
from ehr_features.demo.visits import write_ed
from ehr_features.files import alone, check_ours, new_folder, write_json, write_seal
from ehr_features.schema import FRONTAL

GENERATOR_VERSION = (
    4  # raise it with any change of the output; hyper-parameters are chosen on seeds 1-3 and reported on 10 and up
)

Truth = dict[str, Any]
NOTES = [
    "Bayes AUROCs condition on the latents themselves, so they are upper bounds: readers see hourly values with noise "
    "and gaps, and noisy films. both: the probability that the label was drawn from; record: averaged over film parts "
    "given age and sex; film: averaged over record parts given age and sex; last_film: film without the change.",
    "AUROCs are expected ones (a row counts as positive with its probability p, as negative with 1 - p); `realised` "
    "uses the labels that were drawn.",
    "mortality.{record,film,both}: stays of 48 h and more whose patient is alive then and who have an AP film before "
    "48 h; mortality.all: all stays of 48 h and more (both = record where there is no film).",
    "findings: one row per frontal film, label 1 against 0 and empty, -1 left out; the reader knows what was drawn; "
    "what is missing to 1 is label noise. Fracture and Pleural Other are not drawn.",
    "text_signal: frailty is told by complaints and home drugs alone; text: who knows it, age and sex, and nothing of "
    "record or film; both_text: all three; findings_text and findings_film_text: the note alone, and the film with it. "
    "Where no emergency visit tells of frailty its mean counts.",
    "shuffled: findings, ICD codes and death belong to other subjects: 0.5 whatever is read.",
]

LINK_NOTES = [
    "record_link: values charted within 12 h before a film and stored before it. published: AUROC of the value for any "
    "of its findings, with its source; planted: at this record_link; realised: over frontal films with the value.",
    "findings_record: the reader knows the film's own planted values, age, sex, and whether it is of an ICU stay; "
    "findings_person: age, sex and place alone; findings_film_record equals findings, because the values depend on "
    "nothing but what is drawn. mortality and phenotypes: record knows the values that are stored by hour 48 too.",
]


MOST_SUBJECTS = 1_000_000


def generate(out: Path, *, subjects: int = 800, seed: int = 0, shuffled: bool = False, **more: Any) -> Truth:
    """Write a synthetic MIMIC; the same arguments give the same bytes.

    Args:
        out: a new or empty folder, or one that this function wrote.
        more: further fields of `plan.Plan`: film_size, risk, view_shortcut, ed_text, text_signal, leak, record_link.
    Returns: what truth.json holds.
    Raises: UserError: `out` holds something else, or a value is out of range.
    """
    out = Path(out)
    plan = Plan(subjects=subjects, seed=seed, shuffled=shuffled, **more)
    _check(out, plan)
    with alone(out), new_folder(out) as part:
        outcomes = Outcomes(plan.risk, plan.text_signal)
        everyone = people(plan, outcomes)
        cxr, films, readers = write_cxr(everyone, plan, part / "mimic-cxr")
        with drawing(films, plan, part / "mimic-cxr"):
            counts = write_hosp(everyone, plan, part / "mimic-iv/hosp")
            counts |= write_icu(everyone, plan, part / "mimic-iv/icu")
            counts |= write_events(everyone, plan, part / "mimic-iv/hosp", part / "mimic-iv/icu")
            counts |= write_ed(everyone, plan, part / "mimic-iv-ed/ed")
            stays = _stays_truth(everyone, films, outcomes)
        stays.to_parquet(part / "truth.parquet", index=False)
        drawn = films[["dicom_id", "study_id", "subject_id", "stay_id", "view", *NAMES]]
        if everyone.planted is not None:
            values = pd.DataFrame(everyone.planted.readings(), columns=[f"value_{name}" for name in VALUES])
            drawn = pd.concat([drawn, values.iloc[films["study"]].set_index(drawn.index)], axis=1)
        drawn.to_parquet(part / "truth_films.parquet", index=False)
        best = {name: best_auroc(films, readers["true"], readers[name]) for name in readers if name != "true"}
        truth = _truth(plan, counts | cxr, stays, best)
        if everyone.planted is not None:
            truth["record_link"] = _link_truth(plan, drawn.assign(age=films["age"]))
        write_json(part / "truth.json", truth)
        write_seal(part, "truth*")
    return truth


def run(args: argparse.Namespace) -> int:
    """Write the demo data; print what was written and the next command."""
    keys = [field.name for field in dataclasses.fields(Plan)]
    out = Path(args.out)
    print(f"writing a synthetic MIMIC of {args.subjects} subjects (seed {args.seed}) to {out}", flush=True)
    truth = generate(out, **{key: getattr(args, key) for key in keys})
    for name, count in truth["rows"].items():
        print(f"  {name:24s} {count:>9,d}")
    best = truth["bayes"]["mortality"]
    print(
        f"  48-h mortality: {best['positives']} deaths in {best['n']} stays with a film; best possible AUROC: "
        f"record {best['record']:.3f}, film {best['film']:.3f}, both {best['both']:.3f}"
    )
    print(f"wrote {out}")
    folders = [f"mimic_iv={out}/mimic-iv", f"mimic_cxr={out}/mimic-cxr", f"mimic_ed={out}/mimic-iv-ed"]
    print(f"next: {command_line('features', 'demo/features', *folders)}")
    return 0


def _check(out: Path, plan: Plan) -> None:
    check_ours(out, "a hospital of `ehr_features demo`", ["truth.json"])
    if plan.subjects < 50:
        raise UserError(f"subjects: got {plan.subjects}, wanted 50 or more, so that every kind of row occurs")
    if plan.subjects > MOST_SUBJECTS:
        raise UserError(f"subjects: got {plan.subjects}, wanted {MOST_SUBJECTS:,} or fewer; MIMIC-IV has 364,627")
    if not 0 <= plan.seed < 2**32:
        raise UserError(f"seed: got {plan.seed}, wanted 0 to 4,294,967,295")
    if not 32 <= plan.film_size <= 2048:
        raise UserError(f"film_size: got {plan.film_size}, wanted 32 to 2048 pixels")
    if not 0 <= plan.text_signal <= 10:
        raise UserError(f"text_signal: got {plan.text_signal}, wanted 0 to 10")
    if not 0 <= plan.record_link <= 2:
        raise UserError(f"record_link: got {plan.record_link}, wanted 0 (nothing planted) to 2; 1 is as published")
    for name in ("view_shortcut", "ed_text", "leak"):
        if not 0 <= getattr(plan, name) <= 1:
            raise UserError(f"{name}: got {getattr(plan, name)}, wanted 0 to 1")
    if plan.risk not in ("level", "change"):
        raise UserError(f"risk: got {plan.risk!r}, wanted level or change")


def _stays_truth(everyone: People, films: pd.DataFrame, outcomes: Outcomes) -> pd.DataFrame:
    """One row per ICU stay: whether it has a 48-h mortality sample, the record part, and P(death), P(phenotype) per
    reader."""
    stays, place = everyone.stays, everyone.stays["admission"].to_numpy()
    table = stays[["subject_id", "hadm_id", "stay_id", "hours", "died"]].reset_index(drop=True)
    hours_to_death = np.nan_to_num(hours_between(stays["deathtime"], stays["intime"]), nan=np.inf)
    table["eligible"] = (table["hours"] >= 48) & (hours_to_death > 48)
    frontal = films.loc[(films["view"] == "AP") & films["stay_id"].notna(), ["stay_id", "time"]]
    frontal = frontal.merge(stays[["stay_id", "intime"]], on="stay_id")
    early = frontal.loc[hours_between(frontal["time"], frontal["intime"]) <= 48, "stay_id"]
    table["has_film"] = table["stay_id"].isin(early)
    table["severity"] = everyone.record[place, 0]
    age_z, male = age_and_sex(stays)
    visited = everyone.visits["admission"].to_numpy()
    known = everyone.admissions["frail"].to_numpy() * np.isin(np.arange(len(everyone.admissions)), visited)
    planted = everyone.planted
    likelihood = None if planted is None else stay_likelihood(everyone.studies, stays, planted)
    readers = outcomes.probabilities(
        everyone.record[place], everyone.film[place], age_z, male, known[place], likelihood=likelihood
    )
    readers["true"] = sigmoid(
        outcomes.logits(
            everyone.record[place], everyone.film[place], age_z, male, everyone.admissions["frail"].to_numpy()[place]
        )
    )
    groups = [f"phenotype_{group}" for group in PHENOTYPES]
    parts = [table, pd.DataFrame(everyone.phenotypes[place].astype(int), columns=groups)]
    for reader, p in readers.items():
        parts.append(pd.DataFrame(p, columns=[f"{name}_{reader}" for name in ("death", *groups)]))
    return pd.concat(parts, axis=1)


def _truth(plan: Plan, rows: dict[str, int], stays: pd.DataFrame, findings: dict[str, Truth]) -> Truth:
    chosen = stays[stays["eligible"]]
    paired = chosen[chosen["has_film"]]

    def best(table: pd.DataFrame, label: str, reader: str) -> float | None:
        if plan.shuffled:
            return 0.5
        return auroc(table[f"{label}_{reader}"].to_numpy(), table[f"{label}_true"].to_numpy())

    readers = ["record", "film", "last_film", "both", *(["text", "both_text"] if plan.text_signal else [])]
    mortality: Truth = {reader: best(paired, "death", reader) for reader in readers}
    mortality |= {"n": len(paired), "positives": int(paired["died"].sum())}
    mortality["realised"] = {
        reader: auroc(paired[f"death_{reader}"].to_numpy(), paired["died"].to_numpy(float)) for reader in readers
    }
    mixed = chosen.assign(death_mixed=chosen["death_both"].where(chosen["has_film"], chosen["death_record"]))
    mortality["all"] = {"record": best(chosen, "death", "record"), "both": best(mixed, "death", "mixed")}
    mortality["all"] |= {"n": len(chosen), "positives": int(chosen["died"].sum())}
    groups = {str(g): {reader: best(stays, f"phenotype_{g}", reader) for reader in readers} for g in PHENOTYPES}
    macro = {reader: float(np.mean([row[reader] for row in groups.values()])) for reader in readers}
    if plan.shuffled:
        findings = {reader: dict.fromkeys(best, 0.5) for reader, best in findings.items()}
    options = {
        "film_size": plan.film_size,
        "risk": plan.risk,
        "view_shortcut": plan.view_shortcut,
        "ed_text": plan.ed_text,
        "text_signal": plan.text_signal,
        "leak": plan.leak,
        "record_link": plan.record_link,
    }
    told = {"findings_text": findings["text"], "findings_film_text": findings["film_text"]} if plan.text_signal else {}
    if plan.record_link:  # the values follow what is drawn, so they add nothing to who knows that
        told |= {"findings_record": findings["record"], "findings_film_record": findings["film"]}
        told |= {"findings_person": findings["person"]}
    bayes = {"mortality": mortality, "phenotypes": {"macro": macro, "groups": groups}, "findings": findings["film"]}
    return {
        "generator_version": GENERATOR_VERSION,
        "seed": plan.seed,
        "subjects": plan.subjects,
        "shuffled": plan.shuffled,
        "options": options,
        "rows": rows,
        "bayes": bayes | told,
        "notes": NOTES + (LINK_NOTES if plan.record_link else []),
    }


def _link_truth(plan: Plan, films: pd.DataFrame) -> Truth:
    """What was planted: of each value its item, findings, strength, source, and the AUROC and share measured here."""
    frontal, link = films[films["view"].isin(FRONTAL)], {}
    for name, value in VALUES.items():
        held = frontal[frontal[f"value_{name}"].notna()]
        there = (held[list(value.findings)] > 0).any(axis=1).to_numpy(float)
        score = held[f"value_{name}"].to_numpy() * (-1 if value.falls else 1)
        link[name] = {
            "itemid": value.item,
            "findings": list(value.findings),
            "published": value.auroc,
            "source": value.source,
            "planted": strength(value, plan.record_link),
            "realised": auroc(score, there) if value.findings else None,
            "measured": len(held) / max(len(frontal), 1),
        }
    heart = (frontal["heart"] > 0).to_numpy(float)
    age = {"findings": ["heart"], "source": NO_SOURCE, "realised": auroc(frontal["age"].to_numpy(float), heart)}
    return link | {"age": age}
