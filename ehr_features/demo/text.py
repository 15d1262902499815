"""Free text of the synthetic emergency tables: complaints and drugs that depend on frailty, leaks, missing entries.

`frail` is +1 or -1 for each admission and visit. With `text_signal` it affects death, Fracture and Pneumonia (truth.py,
cxr.py). Only chief complaints and home drugs depend on it, no film and no measurement. With `leak`, complaints name
findings of the visit's film. The random streams are separate, so the other tables are equal with and without text.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ehr_features.demo.plan import Plan
from ehr_features.demo.truth import Array

FRAIL = ("FTT", "Weakness", "s/p Fall", "Unable to ambulate", "AMS", "Decreased PO intake")
ROBUST = ("Sore throat", "L ankle inj", "Palps", "Back pain", "HA", "Lac")
FRAIL_DRUGS = ("Donepezil", "Mirtazapine", "Warfarin", "Digoxin", "Senna", "Quetiapine")
ROBUST_DRUGS = ("Ibuprofen", "Loratadine", "Multivitamin", "Sertraline", "Fluticasone Nasal", "Sumatriptan")
LEAKS = {
    "edema": "Pulm edema",
    "effusion": "Pleural effusion",
    "consolidation": "PNA",
    "heart": "Cardiomegaly on CXR",
    "pneumothorax": "PTX",
    "lesion": "Lung nodule",
    "atelectasis": "Atelectasis",
}


def frailty(seed: int, count: int, stream: int) -> Array:
    """+1 or -1 each."""
    return np.where(np.random.default_rng([seed, 7, stream]).random(count) < 0.5, 1.0, -1.0)


def share(signal: float) -> float:
    """P(a frail patient has one of FRAIL_DRUGS) is .5 + this; of ROBUST_DRUGS .5 - this."""
    return 0.38 * min(signal, 1.0)


def complaints(words: pd.Series, visits: pd.DataFrame, studies: pd.DataFrame, plan: Plan) -> pd.Series:
    """Chief complaints with frailty words, planted leaks, abbreviations and typing errors.

    Args:
        words: one per visit. visits: ed_stay_id, frail, ... studies: ed_stay_id, x_NAME: what the visits' films show.
    """
    rng = np.random.default_rng([plan.seed, 8])
    words, count = words.reset_index(drop=True).astype(object), len(words)
    if plan.text_signal > 0:
        told = rng.random(count) < 0.5 + share(plan.text_signal)
        frail = (visits["frail"].to_numpy() > 0) == told
        new = np.where(frail, rng.choice(FRAIL, count), rng.choice(ROBUST, count))
        words = pd.Series(new, dtype=object).str.cat(words.fillna(""), sep=", ").str.removesuffix(", ")
    if plan.leak > 0:
        shown = studies.dropna(subset="ed_stay_id").drop_duplicates("ed_stay_id", keep="last").set_index("ed_stay_id")
        drawn = shown.reindex(visits["ed_stay_id"])[[f"x_{name}" for name in LEAKS]].to_numpy(float)
        named = (np.nan_to_num(drawn, nan=-9.0) > 0) & (rng.random((count, len(LEAKS))) < plan.leak)
        added = [", ".join(np.array(list(LEAKS.values()))[row]) for row in named]
        words = words.fillna("").str.cat(pd.Series(added, dtype=object), sep=", ").str.strip(", ")
        words = words.mask(words == "")
    return words.mask(rng.random(count) < 0.01, "UNKNOWN").mask(rng.random(count) < 0.01, "___")


def home_drugs(recon: pd.DataFrame, visits: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """medrecon with the drugs of frail patients, charted early in the visit, and a second class for some drugs."""
    rng = np.random.default_rng([plan.seed, 9])
    if plan.text_signal > 0:
        lean = np.array([share(plan.text_signal)] * len(FRAIL_DRUGS) + [-share(plan.text_signal)] * len(ROBUST_DRUGS))
        has = rng.random((len(visits), len(lean))) < 0.5 + lean * visits["frail"].to_numpy()[:, None]
        visit, drug = np.nonzero(has)
        rows = visits.iloc[visit]
        more = pd.DataFrame({"subject_id": rows["subject_id"], "stay_id": rows["ed_stay_id"]})
        more["charttime"] = rows["intime"] + pd.to_timedelta(60 * rng.integers(2, 20, len(rows)), "s")
        names = np.array([*FRAIL_DRUGS, *ROBUST_DRUGS], object)[drug]
        more = more.assign(name=names, gsn="000000", ndc="00000000000", etccode="00000000", etcdescription="Other")
        recon = pd.concat([recon, more.assign(etc_rn=1)], ignore_index=True)
    second = recon[rng.random(len(recon)) < 0.15].assign(etc_rn=2, etccode="00009999", etcdescription="Second class")
    order = ["subject_id", "stay_id", "charttime", "name", "etc_rn"]
    return pd.concat([recon, second]).sort_values(order, kind="stable", ignore_index=True)


def with_frailty(studies: pd.DataFrame, stays: pd.DataFrame, visits: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Add `frail` to studies, and `told`: whether the text of an emergency visit (own or of the admission) shows it."""
    own = studies["ed_stay_id"].map(visits.set_index("ed_stay_id")["frail"])
    admission = studies["stay_id"].map(stays.set_index("stay_id")["admission"])
    theirs = studies["stay_id"].map(stays.set_index("stay_id")["frail"])
    told = own.notna() | admission.isin(visits.loc[visits["admission"] >= 0, "admission"])
    rest = frailty(plan.seed, len(studies), 2)
    return studies.assign(frail=own.fillna(theirs).fillna(pd.Series(rest, studies.index)), told=told)
