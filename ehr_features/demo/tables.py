"""Write the synthetic people as hosp/ and icu/ tables of MIMIC-IV 2.2."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from ehr_features import phenotypes
from ehr_features.demo.people import People
from ehr_features.demo.plan import Plan, hours_between
from ehr_features.demo.record_link import BEDSIDE, VALUES
from ehr_features.demo.truth import PHENOTYPES
from ehr_features.series.channels import SPECIMEN_TYPE


def columns(names: str) -> list[str]:
    """Column names from one line of text."""
    return names.split()


ADMISSIONS = columns(
    "subject_id hadm_id admittime dischtime deathtime admission_type admit_provider_id admission_location "
    "discharge_location insurance language marital_status race edregtime edouttime hospital_expire_flag"
)
CHART = columns("subject_id hadm_id stay_id caregiver_id charttime storetime itemid value valuenum valueuom warning")
LAB = columns(
    "labevent_id subject_id hadm_id specimen_id itemid order_provider_id charttime storetime value valuenum valueuom "
    "ref_range_lower ref_range_upper flag priority comments"
)
D_ITEMS = columns("itemid label abbreviation linksto category unitname param_type lownormalvalue highnormalvalue")

# chart item: label, unit, category
ITEMS: dict[int, tuple[str, str, str]] = {
    220045: ("Heart Rate", "bpm", "Routine Vital Signs"),
    220210: ("Respiratory Rate", "insp/min", "Respiratory"),
    224690: ("Respiratory Rate (Total)", "insp/min", "Respiratory"),
    220179: ("Non Invasive Blood Pressure systolic", "mmHg", "Routine Vital Signs"),
    220180: ("Non Invasive Blood Pressure diastolic", "mmHg", "Routine Vital Signs"),
    220181: ("Non Invasive Blood Pressure mean", "mmHg", "Routine Vital Signs"),
    220050: ("Arterial Blood Pressure systolic", "mmHg", "Routine Vital Signs"),
    220051: ("Arterial Blood Pressure diastolic", "mmHg", "Routine Vital Signs"),
    220052: ("Arterial Blood Pressure mean", "mmHg", "Routine Vital Signs"),
    220277: ("O2 saturation pulseoxymetry", "%", "Respiratory"),
    223761: ("Temperature Fahrenheit", "°F", "Routine Vital Signs"),
    223762: ("Temperature Celsius", "°C", "Routine Vital Signs"),
    223835: ("Inspired O2 Fraction", "", "Respiratory"),
    225664: ("Glucose finger stick (range 70-100)", "", "Labs"),
    220621: ("Glucose (serum)", "", "Labs"),
    223830: ("PH (Arterial)", "", "Labs"),
    220739: ("GCS - Eye Opening", "", "Neurological"),
    223900: ("GCS - Verbal Response", "", "Neurological"),
    223901: ("GCS - Motor Response", "", "Neurological"),
    223951: ("Capillary Refill R", "", "Cardiovascular (Pulses)"),
    224308: ("Capillary Refill L", "", "Cardiovascular (Pulses)"),
    226707: ("Height", "Inch", "General"),
    226730: ("Height (cm)", "cm", "General"),
    226512: ("Admission Weight (Kg)", "kg", "General"),
    226531: ("Admission Weight (lbs.)", "", "General"),
    224639: ("Daily Weight", "kg", "General"),
    223758: ("Code Status", "", "General"),
    220001: ("Problem List", "", "General"),  # an item that no variable uses
}
# laboratory item: label, fluid, category, unit, mean, gain on its channel, channel, digits, reference range
LABS: dict[int, tuple[str, str, str, str, float, float, str, int, float, float]] = {
    50931: ("Glucose", "Blood", "Chemistry", "mg/dL", 134, 17, "glucose", 0, 70, 100),
    50809: ("Glucose", "Blood", "Blood Gas", "mg/dL", 136, 17, "glucose", 0, 70, 105),
    50820: ("pH", "Blood", "Blood Gas", "units", 7.385, -0.035, "ph", 2, 7.35, 7.45),
    50817: ("Oxygen Saturation", "Blood", "Blood Gas", "%", 95.5, -1.3, "spo2", 0, 95, 100),
    50912: ("Creatinine", "Blood", "Chemistry", "mg/dL", 1.3, 0.35, "ph", 1, 0.5, 1.2),
    50813: ("Lactate", "Blood", "Blood Gas", "mmol/L", 2.0, 0.7, "bp", 1, 0.5, 2.0),
    51301: ("White Blood Cells", "Blood", "Hematology", "K/uL", 11.0, 2.2, "temp", 1, 4.0, 11.0),
    51478: ("Glucose", "Urine", "Hematology", "mg/dL", 60, 10, "glucose", 0, 0, 0),
    51491: ("pH", "Urine", "Hematology", "units", 6.0, 0.1, "temp", 1, 5, 8),
}
EYE = ("None", "To Pain", "To Speech", "Spontaneously")
VERBAL = ("No Response", "Incomprehensible sounds", "Inappropriate Words", "Confused", "Oriented")
MOTOR = ("No response", "Abnormal extension", "Abnormal Flexion", "Flex-withdraws", "Localizes Pain", "Obeys Commands")
TITLES = {  # of the codes of each CCS group, in our own words
    2: "Sepsis", 49: "Diabetes without complication", 50: "Diabetes with complication", 53: "High blood lipids",
    55: "Disorder of fluids and electrolytes", 98: "Essential hypertension", 99: "Hypertension with complication",
    100: "Acute myocardial infarction", 101: "Coronary atherosclerosis", 105: "Conduction disorder",
    106: "Cardiac arrhythmia", 108: "Congestive heart failure", 109: "Acute cerebrovascular disease", 122: "Pneumonia",
    127: "Chronic obstructive pulmonary disease", 130: "Pleural effusion or pneumothorax",
    131: "Acute respiratory failure", 133: "Other lower respiratory disease", 134: "Upper respiratory disease",
    151: "Other liver disease", 153: "Gastrointestinal hemorrhage", 157: "Acute kidney failure",
    158: "Chronic kidney disease", 238: "Complication of surgery or medical care", 249: "Shock",
}  # fmt: skip
REFILL = ("Normal <3 Seconds", "Abnormal >3 Seconds", "Normal <3 secs", "Brisk", "Delayed")


def write_csv(table: pd.DataFrame, path: Path, *, plain: bool = False) -> int:
    """Write .csv.gz as MIMIC does; the same bytes for the same table. `plain`: no value needs quotes (faster)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(path.as_posix(), "wb", compresslevel=1, mtime=0) as file:
        if plain:
            arrow = pa.Table.from_pandas(table, preserve_index=False)
            header = ",".join(arrow.column_names) + "\n"
            file.write(header.encode())
            pa.csv.write_csv(arrow, file, pa.csv.WriteOptions(include_header=False, quoting_style="none"))
        else:
            file.write(table.to_csv(index=False, lineterminator="\n").encode())
    return len(table)


def write_hosp(people: People, plan: Plan, out: Path) -> dict[str, int]:
    """patients, admissions, diagnoses_icd, d_icd_diagnoses, d_labitems (labevents: `write_events`)."""
    rng = np.random.default_rng([plan.seed, 2])
    known = people.subjects[people.subjects["kind"] != "film"]  # the other subjects have films only
    patients = pd.DataFrame(
        {
            "subject_id": known["subject_id"],
            "gender": np.where(known["male"], "M", "F"),
            "anchor_age": known["age"].where(known["age"] <= 89, 91),
            "anchor_year": known["anchor_year"],
            "anchor_year_group": known["year_group"],
            "dod": known["dod"].dt.strftime("%Y-%m-%d"),
        }
    )
    table, count = people.admissions, len(people.admissions)
    admissions = table.assign(
        admission_type=np.where(
            table["edregtime"].notna(), "EW EMER.", rng.choice(["URGENT", "ELECTIVE", "OBSERVATION ADMIT"], count)
        ),
        admit_provider_id=[f"P{n:03X}" for n in rng.integers(0, 4096, count)],
        admission_location=np.where(table["edregtime"].notna(), "EMERGENCY ROOM", "PHYSICIAN REFERRAL"),
        discharge_location=np.where(
            table["died"], "DIED", rng.choice(["HOME", "SKILLED NURSING FACILITY", "HOME HEALTH CARE"], count)
        ),
        insurance=rng.choice(["Medicare", "Medicaid", "Other"], count, p=[0.5, 0.15, 0.35]),
        language=rng.choice(["ENGLISH", "?"], count, p=[0.88, 0.12]),
        marital_status=rng.choice(np.array(["MARRIED", "SINGLE", "WIDOWED", None], object), count),
        hospital_expire_flag=table["died"].astype(int),
    )[ADMISSIONS]
    codes = pd.read_csv(phenotypes.PHENOTYPES, dtype={"icd_code": str})
    diagnoses = _diagnoses(rng, people, codes)
    titles = diagnoses[["icd_code", "icd_version"]].drop_duplicates().sort_values(["icd_version", "icd_code"])
    group = titles.merge(codes.drop_duplicates(["icd_version", "icd_code"]), "left", ["icd_version", "icd_code"])["ccs"]
    named = group.map(TITLES).fillna("Other condition").to_numpy()
    titles["long_title"] = named + ", code " + titles["icd_code"]
    items = [(item, *row[:3]) for item, row in LABS.items()]
    items.append((SPECIMEN_TYPE, "Specimen Type", "Blood", "Blood Gas"))
    if people.planted is not None:
        more = [VALUES[name] for name in VALUES if name not in BEDSIDE and VALUES[name].item not in LABS]
        items += [(v.item, v.label, "Blood", "Hematology" if v.item in (51222, 51265) else "Chemistry") for v in more]
    return {
        "hosp/patients": write_csv(patients, out / "patients.csv.gz"),
        "hosp/admissions": write_csv(admissions, out / "admissions.csv.gz"),
        "hosp/diagnoses_icd": write_csv(diagnoses, out / "diagnoses_icd.csv.gz"),
        "hosp/d_icd_diagnoses": write_csv(titles, out / "d_icd_diagnoses.csv.gz"),
        "hosp/d_labitems": write_csv(
            pd.DataFrame(items, columns=["itemid", "label", "fluid", "category"]), out / "d_labitems.csv.gz"
        ),
    }


def _diagnoses(rng: np.random.Generator, people: People, codes: pd.DataFrame) -> pd.DataFrame:
    """One or two codes of every phenotype that an admission has, and codes of no group."""
    usable = codes[codes["presets"].str.contains("default")]
    admission, phenotype = np.nonzero(people.phenotypes)
    twice = rng.random(len(admission)) < 0.2
    admission, phenotype = np.concatenate([admission, admission[twice]]), np.concatenate([phenotype, phenotype[twice]])
    version = people.admissions["icd_version"].to_numpy()[admission]
    chosen = np.empty(len(admission), object)
    for k, group in enumerate(PHENOTYPES):
        for v in (9, 10):
            rows = np.flatnonzero((phenotype == k) & (version == v))
            pool = usable.loc[(usable["ccs"] == group) & (usable["icd_version"] == v), "icd_code"].to_numpy()
            chosen[rows] = rng.choice(pool, len(rows))
    filler = np.repeat(np.arange(len(people.admissions)), rng.integers(1, 4, len(people.admissions)))
    old = people.admissions["icd_version"].to_numpy()[filler] == 9
    other = np.where(
        old,
        rng.choice(["V5861", "V1582", "30000", "56400"], len(filler)),
        rng.choice(["Z87891", "Z7901", "F419", "K5900"], len(filler)),
    )
    table = pd.DataFrame(
        {"admission": np.concatenate([admission, filler]), "icd_code": np.concatenate([chosen, other])}
    )
    table["order"] = rng.random(len(table))
    table = table.drop_duplicates(["admission", "icd_code"]).sort_values(["admission", "order"])
    table["seq_num"] = table.groupby("admission").cumcount() + 1
    keys = people.admissions.loc[table["admission"], ["subject_id", "hadm_id", "icd_version"]].reset_index(drop=True)
    table = pd.concat([table.reset_index(drop=True), keys], axis=1)
    return table[["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"]]


def write_icu(people: People, plan: Plan, out: Path) -> dict[str, int]:
    """icustays and d_items (chartevents: `write_events`)."""
    stays = people.stays
    los = hours_between(stays["outtime"], stays["intime"]) / 24
    table = stays[["subject_id", "hadm_id", "stay_id"]].assign(
        first_careunit=stays["unit"],
        last_careunit=stays["last_unit"],
        intime=stays["intime"],
        outtime=stays["outtime"],
        los=los,
    )
    named = dict(ITEMS)
    if people.planted is not None:
        named |= {VALUES[name].item: (VALUES[name].label, VALUES[name].unit, "Respiratory") for name in BEDSIDE}
    items = pd.DataFrame(
        [
            (
                item,
                label,
                label,
                "chartevents",
                category,
                unit or None,
                "Text"
                if item in (220739, 223900, 223901, 223951, 224308, 223758, VALUES["ventilator"].item)
                else "Numeric",
                None,
                None,
            )
            for item, (label, unit, category) in named.items()
        ],
        columns=D_ITEMS,
    )
    return {
        "icu/icustays": write_csv(table, out / "icustays.csv.gz"),
        "icu/d_items": write_csv(items, out / "d_items.csv.gz"),
    }
