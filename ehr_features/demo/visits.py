"""Write the emergency visits of the synthetic people as MIMIC-IV-ED 2.2 tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ehr_features.demo import text as demo_text
from ehr_features.demo.link_rows import with_planted_signs
from ehr_features.demo.people import People
from ehr_features.demo.plan import Plan
from ehr_features.demo.tables import columns, write_csv
from ehr_features.demo.truth import Array

# chief complaints unrelated to the chest, and those about a finding of the visit's film
PLAIN = (
    "ABD PAIN",
    "s/p Fall",
    "Weakness",
    "Dizziness",
    "HEADACHE",
    "Altered mental status",
    "Hypotension",
    "N/V",
    "Fever",
    "BRBPR",
    "Syncope",
    "Leg pain",
)
TOLD = {
    "edema": ("SOB", "Dyspnea on exertion", "Orthopnea, leg swelling"),
    "effusion": ("Dyspnea", "SOB, R flank pain"),
    "consolidation": ("Fever, Productive cough", "Cough", "Cough, chills", "ILI"),
    "heart": ("Palpitations", "Chest pressure", "DOE, weight gain"),
    "pneumothorax": ("Sudden onset chest pain", "Pleuritic chest pain"),
    "lesion": ("Hemoptysis", "Weight loss"),
    "atelectasis": ("s/p Rib fx, Pain with breathing",),
}
LEAKS = {
    "consolidation": "PNEUMONIA, Transfer",
    "effusion": "Pleural effusion, Abnormal CXR",
    "pneumothorax": "Pneumothorax",
}
DRUGS = (
    ("Furosemide", "008209", "00591578101", 2850, "00000266", "Diuretic - Loop"),
    ("Lisinopril", "000391", "43547035310", 2689, "00000239", "ACE Inhibitors"),
    ("Albuterol Inhaler", "028090", "00173068220", 5970, "00003412", "Asthma/COPD - Beta Agonist"),
    ("Metformin", "004763", "00093104801", 774, "00000771", "Antihyperglycemic - Biguanide"),
    ("Metoprolol Tartrate", "005139", "00378001801", 2597, "00000257", "Beta Blockers"),
    ("Atorvastatin", "029967", "00071015523", 2747, "00000248", "Antihyperlipidemic - HMG CoA Reductase Inhibitors"),
)
GIVEN = (
    ("Acetaminophen", "004489"),
    ("Morphine", "004072"),
    ("Ondansetron", "015869"),
    ("Furosemide", "008205"),
    ("CeftriaXONE", "009162"),
    ("Levofloxacin", "046771"),
)


def write_ed(people: People, plan: Plan, out: Path) -> dict[str, int]:
    """edstays, triage, vitalsign, medrecon, pyxis, diagnosis."""
    rng = np.random.default_rng([plan.seed, 4])
    visits, count = people.visits, len(people.visits)
    key = pd.DataFrame({"subject_id": visits["subject_id"], "stay_id": visits["ed_stay_id"]})
    inside = visits["admission"].to_numpy() >= 0
    stays = pd.DataFrame(
        {
            "subject_id": visits["subject_id"],
            "hadm_id": visits["hadm_id"].astype("Int64"),
            "stay_id": visits["ed_stay_id"],
            "intime": visits["intime"],
            "outtime": visits["outtime"],
            "gender": np.where(visits["male"], "M", "F"),
            "race": visits["race"],
            "arrival_transport": rng.choice(["AMBULANCE", "WALK IN", "UNKNOWN"], count, p=[0.5, 0.4, 0.1]),
            "disposition": np.where(inside, "ADMITTED", "HOME"),
        }
    )
    severity = np.where(inside, people.record[visits["admission"].clip(lower=0), 0], -1.0)
    triage = pd.concat([key, _signs(rng, severity, 0.06)], axis=1)
    triage["pain"] = rng.choice(np.array([*map(str, range(11)), "ua", "unable", None], object), count)
    triage["acuity"] = np.clip(np.round(2.6 - 0.5 * severity + 0.6 * rng.standard_normal(count)), 1, 5)
    triage.loc[rng.random(count) < 0.02, "acuity"] = np.nan
    triage["chiefcomplaint"] = demo_text.complaints(_complaints(rng, people, plan), visits, people.studies, plan)
    times = np.repeat(np.arange(count), np.where(rng.random(count) < 0.05, 0, rng.integers(1, 6, count)))
    vital = _at(rng, visits, key, times)
    vital = pd.concat([vital, _signs(rng, severity[times], 0.05)], axis=1)
    vital["rhythm"] = rng.choice(
        np.array([None, "Normal Sinus Rhythm", "Atrial Fibrillation"], object), len(vital), p=[0.8, 0.17, 0.03]
    )
    vital["pain"] = rng.choice(np.array([*map(str, range(11)), None], object), len(vital))
    vital = with_planted_signs(vital, people, _film_signs(plan, people, severity))
    home = np.repeat(np.arange(count), rng.integers(0, 4, count))
    recon = _at(rng, visits, key, home)
    drugs = pd.DataFrame(DRUGS, columns=["name", "gsn", "ndc", "rn", "etccode", "etcdescription"])
    recon = pd.concat([recon, drugs.iloc[rng.integers(0, len(drugs), len(recon))].reset_index(drop=True)], axis=1)
    recon["etc_rn"] = 1
    recon = demo_text.home_drugs(recon.drop(columns="rn"), visits, plan)
    given = np.repeat(np.arange(count), rng.integers(0, 4, count))
    pyxis = _at(rng, visits, key, given)
    pyxis["med_rn"] = pyxis.groupby("stay_id").cumcount() + 1
    pyxis = pd.concat(
        [
            pyxis,
            pd.DataFrame(GIVEN, columns=["name", "gsn"])
            .iloc[rng.integers(0, len(GIVEN), len(pyxis))]
            .reset_index(drop=True),
        ],
        axis=1,
    )
    pyxis["gsn_rn"] = 1
    codes = np.array(
        [
            ["R079", "Chest pain, unspecified"],
            ["R0602", "Shortness of breath"],
            ["R509", "Fever, unspecified"],
            ["R55", "Syncope and collapse"],
        ]
    )
    diagnosis = pd.concat(
        [key, pd.DataFrame(codes[rng.integers(0, 4, count)], columns=["icd_code", "icd_title"])], axis=1
    ).assign(seq_num=1, icd_version=10)
    tables = {
        "edstays": stays,
        "triage": triage[
            columns("subject_id stay_id temperature heartrate resprate o2sat sbp dbp pain acuity chiefcomplaint")
        ],
        "vitalsign": vital[
            columns("subject_id stay_id charttime temperature heartrate resprate o2sat sbp dbp rhythm pain")
        ],
        "medrecon": recon[columns("subject_id stay_id charttime name gsn ndc etc_rn etccode etcdescription")],
        "pyxis": pyxis[columns("subject_id stay_id charttime med_rn name gsn_rn gsn")],
        "diagnosis": diagnosis[columns("subject_id stay_id seq_num icd_code icd_version icd_title")],
    }
    return {f"ed/{name}": write_csv(table, out / f"{name}.csv.gz") for name, table in tables.items()}


def _at(rng: np.random.Generator, visits: pd.DataFrame, key: pd.DataFrame, rows: Array) -> pd.DataFrame:
    """Keys of the visits in `rows`, each with a time within the visit, in order."""
    table = key.iloc[rows].reset_index(drop=True)
    start, end = visits["intime"].to_numpy()[rows], visits["outtime"].to_numpy()[rows]
    seconds = ((end - start) / np.timedelta64(1, "s") * rng.random(len(rows))) // 60 * 60
    table["charttime"] = start + seconds.astype(int).astype("timedelta64[s]")
    return table.sort_values(["subject_id", "stay_id", "charttime"], ignore_index=True)


def _signs(rng: np.random.Generator, severity: Array, missing: float) -> pd.DataFrame:
    """Vital signs (temperature in F) with independent gaps; a few values are Celsius or impossible."""
    count = len(severity)
    gains = {
        "temperature": (98.3, 0.4, 0.8, 1),
        "heartrate": (87, 6, 13, 0),
        "resprate": (18, 1.2, 2.5, 0),
        "o2sat": (97, -0.9, 1.8, 0),
        "sbp": (134, -7, 19, 0),
        "dbp": (76, -3, 12, 0),
    }
    table = pd.DataFrame(index=range(count))
    for name, (mean, gain, sd, digits) in gains.items():
        value = np.round(mean + gain * severity + sd * rng.standard_normal(count), digits)
        value = np.minimum(value, 100) if name == "o2sat" else value
        if name == "temperature":
            value = np.where(rng.random(count) < 0.01, np.round((value - 32) / 1.8, 1), value)
        value = np.where(rng.random(count) < 0.002, 9999, value)
        column = pd.Series(np.where(rng.random(count) < missing, np.nan, value))
        table[name] = column if digits else column.astype("Int64")
    return table


def _film_signs(plan: Plan, people: People, severity: Array) -> pd.DataFrame:
    """Signs of a row for each study; those of studies outside visits are not used."""
    visit = pd.Index(people.visits["ed_stay_id"]).get_indexer(people.studies["ed_stay_id"].fillna(-1).astype("int64"))
    return _signs(np.random.default_rng([plan.seed, 11]), severity[visit], 0.05)


def _complaints(rng: np.random.Generator, people: People, plan: Plan) -> pd.Series:
    """One chief complaint per visit; with probability `plan.ed_text` about a finding of the film taken in the visit."""
    visits, count = people.visits, len(people.visits)
    words = rng.choice(PLAIN, count).astype(object)
    every = np.array([text for texts in TOLD.values() for text in texts], object)
    chest = rng.random(count) < 0.35
    words[chest] = rng.choice(every, chest.sum())
    shown = (
        people.studies.dropna(subset="ed_stay_id").drop_duplicates("ed_stay_id", keep="last").set_index("ed_stay_id")
    )
    shown = shown.reindex(visits["ed_stay_id"])
    drawn = np.nan_to_num(shown[[f"x_{name}" for name in TOLD]].to_numpy(float), nan=-9.0)
    strongest, any_shown = drawn.argmax(1), drawn.max(1) > 0
    told = any_shown & (rng.random(count) < plan.ed_text)
    quiet = (drawn.max(1) > -9) & ~any_shown & (rng.random(count) < plan.ed_text)
    words[quiet] = rng.choice(PLAIN, quiet.sum())
    for k, (name, texts) in enumerate(TOLD.items()):
        rows = np.flatnonzero(told & (strongest == k))
        words[rows] = rng.choice(texts, len(rows))
        if name in LEAKS:  # some complaints name the finding itself, which a leak filter must remove
            words[rows[rng.random(len(rows)) < 0.08]] = LEAKS[name]
    words[rng.random(count) < 0.01] = None
    return pd.Series(words)
