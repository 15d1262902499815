"""The schema of every table that is read and written: column, type, unit, group, available_at.

`READ`: the raw columns that are used, with ibis types; columns missing from some releases are in `optional` or
`renamed`. `WRITTEN`: the columns of features/. Source: MIT-LCP/mimic-code, buildmimic/postgres/create.sql.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import pandas as pd

INT, TEXT, REAL, TIME, DATE = "int64", "string", "float64", "timestamp", "date"


@dataclass(frozen=True)
class Raw:
    """A raw table.

    Attributes:
        places: paths without suffix below its root, newest layout first. keys: ids without which a row is dropped.
    """

    root: Literal["mimic_iv", "mimic_ed", "mimic_cxr"]
    places: tuple[str, ...]
    columns: Mapping[str, str]
    keys: tuple[str, ...] = ()  # none for cxr_metadata: films/metadata.py drops its rows and lists their ids
    optional: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)  # our name -> name in MIMIC-IV 1.0
    rows: Mapping[str, int] = field(default_factory=dict)  # known row counts by release


Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
DEATHS = "admissions whose death the tables tell differently"  # a count of attrition.json
HELD_OUT = ("val", "test")  # splits on which no encoder may be trained
FRONTAL = ("AP", "PA")  # the views that `views: frontal` keeps
VIEW_CODES = {"ANTERO-POSTERIOR": "AP", "POSTERO-ANTERIOR": "PA", "LATERAL": "LATERAL"}  # a code's meaning -> view
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)


def view_names(views: pd.Series, meanings: pd.Series | None = None) -> pd.Series:
    """Views in one spelling, whatever table names them: AP, PA, LATERAL, LL, ...; None where there is none.

    Args:
        meanings: of the views' codes (ViewCodeSequence_CodeMeaning), for films whose view is not named.
    """
    names = views.astype("string").str.strip().str.upper()
    names = names.mask(names == "").replace(VIEW_CODES)
    if meanings is not None:
        names = names.fillna(meanings.astype("string").str.strip().str.upper().map(VIEW_CODES))
    return names.astype(object).where(names.notna(), None)


_IDS = {"subject_id": INT, "hadm_id": INT, "stay_id": INT}
_EVENT = {"charttime": TIME, "storetime": TIME, "itemid": INT, "value": TEXT, "valuenum": REAL}
_VITALS = {name: REAL for name in ("temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp")}


def _rows(v10: int | None, v22: int | None, v31: int | None, demo: int | None) -> dict[str, int]:
    known = {"1.0": v10, "2.2": v22, "3.1": v31, "demo": demo}
    return {release: rows for release, rows in known.items() if rows is not None}


def _moved(name: str) -> tuple[str, str]:
    return f"hosp/{name}", f"core/{name}"


def _ed(name: str) -> tuple[str, str]:
    return f"ed/{name}", name


READ: dict[str, Raw] = {
    "patients": Raw(
        "mimic_iv",
        _moved("patients"),
        {
            "subject_id": INT,
            "gender": TEXT,
            "anchor_age": INT,
            "anchor_year": INT,
            "anchor_year_group": TEXT,
            "dod": DATE,
        },
        ("subject_id",),
        rows=_rows(None, 299_712, 364_627, 100),
    ),
    "admissions": Raw(
        "mimic_iv",
        _moved("admissions"),
        {
            "subject_id": INT,
            "hadm_id": INT,
            "admittime": TIME,
            "dischtime": TIME,
            "deathtime": TIME,
            "admission_type": TEXT,
            "discharge_location": TEXT,
            "insurance": TEXT,
            "language": TEXT,
            "race": TEXT,
            "edregtime": TIME,
            "edouttime": TIME,
            "hospital_expire_flag": INT,
        },
        ("hadm_id", "subject_id"),
        optional=frozenset({"admission_type", "discharge_location", "insurance", "language"}),
        renamed={"race": "ethnicity"},
        rows=_rows(None, 431_231, 546_028, 275),
    ),
    "icustays": Raw(
        "mimic_iv",
        ("icu/icustays",),
        {**_IDS, "first_careunit": TEXT, "last_careunit": TEXT, "intime": TIME, "outtime": TIME, "los": REAL},
        ("stay_id", "subject_id"),
        rows=_rows(76_540, 73_181, 94_458, 140),
    ),
    "diagnoses_icd": Raw(
        "mimic_iv",
        ("hosp/diagnoses_icd",),
        {"subject_id": INT, "hadm_id": INT, "seq_num": INT, "icd_code": TEXT, "icd_version": INT},
        ("hadm_id", "icd_code"),
        rows=_rows(5_280_351, 4_756_326, 6_364_488, 4_506),
    ),
    "d_icd_diagnoses": Raw(
        "mimic_iv",
        ("hosp/d_icd_diagnoses",),
        {"icd_code": TEXT, "icd_version": INT, "long_title": TEXT},
        ("icd_code",),
        rows=_rows(None, 109_775, 112_107, 109_775),
    ),
    "chartevents": Raw(
        "mimic_iv",
        ("icu/chartevents",),
        {**_IDS, **_EVENT},
        ("itemid", "subject_id"),
        rows=_rows(329_499_788, 313_645_063, 432_997_491, 668_862),
    ),
    "labevents": Raw(
        "mimic_iv",
        ("hosp/labevents",),
        {"subject_id": INT, "hadm_id": INT, "specimen_id": INT, **_EVENT},
        ("itemid", "subject_id"),
        optional=frozenset({"specimen_id"}),
        rows=_rows(122_103_667, 118_171_367, 158_374_764, 107_727),
    ),
    "d_items": Raw(
        "mimic_iv",
        ("icu/d_items",),
        {"itemid": INT, "label": TEXT, "category": TEXT},
        ("itemid",),
        optional=frozenset({"category"}),
        rows=_rows(None, 4_014, 4_095, 4_014),
    ),
    "d_labitems": Raw(
        "mimic_iv",
        ("hosp/d_labitems",),
        {"itemid": INT, "label": TEXT, "fluid": TEXT},
        ("itemid",),
        optional=frozenset({"fluid"}),
        rows=_rows(1_630, 1_622, 1_650, 1_622),
    ),
    "edstays": Raw(
        "mimic_ed",
        _ed("edstays"),
        {**_IDS, "intime": TIME, "outtime": TIME, "gender": TEXT, "arrival_transport": TEXT},
        ("stay_id", "subject_id"),
        optional=frozenset({"gender", "arrival_transport"}),  # since MIMIC-IV-ED 2.0
        rows=_rows(None, 425_087, None, None),
    ),
    "triage": Raw(
        "mimic_ed",
        _ed("triage"),
        {"subject_id": INT, "stay_id": INT, **_VITALS, "pain": TEXT, "acuity": REAL, "chiefcomplaint": TEXT},
        ("stay_id",),
        rows=_rows(None, 425_087, None, None),
    ),
    "vitalsign": Raw(
        "mimic_ed",
        _ed("vitalsign"),
        {"subject_id": INT, "stay_id": INT, "charttime": TIME, **_VITALS},
        ("stay_id",),
        rows=_rows(None, 1_564_610, None, None),
    ),
    "medrecon": Raw(
        "mimic_ed",
        _ed("medrecon"),
        {"subject_id": INT, "stay_id": INT, "charttime": TIME, "name": TEXT},
        ("stay_id",),
        rows=_rows(None, 2_987_342, None, None),
    ),
    "pyxis": Raw(
        "mimic_ed",
        _ed("pyxis"),
        {"subject_id": INT, "stay_id": INT, "charttime": TIME, "name": TEXT},
        ("stay_id",),
        rows=_rows(None, 1_586_053, None, None),
    ),
    "cxr_metadata": Raw(
        "mimic_cxr",
        ("mimic-cxr-2.0.0-metadata", "mimic-cxr-2.1.0-metadata"),
        {
            "dicom_id": TEXT,
            "subject_id": INT,
            "study_id": INT,
            "PerformedProcedureStepDescription": TEXT,
            "ViewPosition": TEXT,
            "Rows": INT,
            "Columns": INT,
            "StudyDate": INT,
            "StudyTime": REAL,
            "ViewCodeSequence_CodeMeaning": TEXT,
            "PatientOrientationCodeSequence_CodeMeaning": TEXT,
        },
        optional=frozenset({"PerformedProcedureStepDescription", "Rows", "Columns"}),
        rows={"2.0.0": 377_110, "2.1.0": 377_110},
    ),
    "cxr_split": Raw(
        "mimic_cxr",
        ("mimic-cxr-2.0.0-split", "mimic-cxr-2.1.0-split"),
        {"dicom_id": TEXT, "study_id": INT, "subject_id": INT, "split": TEXT},
        ("subject_id",),
        rows={"2.0.0": 377_110, "2.1.0": 377_110},
    ),
    "cxr_chexpert": Raw(
        "mimic_cxr",
        ("mimic-cxr-2.0.0-chexpert", "mimic-cxr-2.1.0-chexpert"),
        {"subject_id": INT, "study_id": INT, **dict.fromkeys(FINDINGS, REAL)},
        ("study_id",),
        rows={"2.0.0": 227_827, "2.1.0": 227_827},
    ),
}


@dataclass(frozen=True)
class Column:
    """A written column, and what its reader refuses.

    `available_at`: study (known when the film is taken, or at the prediction time), admission, discharge.
    `null`: may be empty. `unique`: each value once. `low`, `high`: limits. `among`: the only values.
    """

    type: str
    unit: str = ""
    group: str = "id"
    available_at: Literal["study", "admission", "discharge"] = "study"
    null: bool = True
    unique: bool = False
    low: float | None = None
    high: float | None = None
    among: tuple[Any, ...] = ()

    @property
    def needed(self) -> bool:
        """Whether a table is of no use without it."""
        return not self.null and self.group in ("id", "split")


def _id(type: str = INT, *, unique: bool = False) -> Column:
    """An id that every row has."""
    return Column(type, null=False, unique=unique, low=0 if type == INT else None)


_SUBJECT, _SPLIT = _id(), Column(TEXT, group="split", null=False, among=SPLITS)
STAYS: dict[str, Column] = {
    "stay_id": _id(unique=True),
    "hadm_id": Column(INT, low=0),
    "subject_id": _SUBJECT,
    "intime": Column(TIME, group="time"),
    "outtime": Column(TIME, group="time", available_at="discharge"),
    "los_hours": Column(REAL, "hours", "outcome", "discharge", null=False, low=0),
    "age_years": Column(INT, "years", "age", "admission", low=0),
    "age_capped": Column("boolean", group="age", available_at="admission"),
    "sex": Column(TEXT, group="sex", available_at="admission"),
    "race": Column(TEXT, group="subgroup", available_at="admission"),
    "anchor_year_group": Column(TEXT, group="subgroup", available_at="admission"),
    "care_unit": Column(TEXT, "the first", "subgroup", "admission"),
    "split": _SPLIT,
}
STAY_FILMS: dict[str, Column] = {  # written by films/linking.py
    "stay_id": _id(),
    "dicom_id": _id(TEXT),
    "hours_from_intime": Column(REAL, "hours", "time", null=False, low=0),
    "view": Column(TEXT, group="view"),
}


def _link(name: str, named: str = "") -> dict[str, Column]:
    return {
        name: Column(INT, group="link", low=0),
        f"{name}_link": Column(TEXT, "inside, before, after" + named, "link"),
        f"{name}_gap_hours": Column(REAL, "hours", "link"),
    }


_VITAL_UNITS = {
    "ed_acuity": "ESI 1 to 5",
    "ed_temperature_c": "C",
    "ed_heart_rate": "1/min",
    "ed_resp_rate": "1/min",
    "ed_o2sat": "%",
    "ed_sbp": "mmHg",
    "ed_dbp": "mmHg",
}
IMAGES: dict[str, Column] = {  # written by films/
    "dicom_id": _id(TEXT, unique=True),
    "study_id": Column(INT, low=0),
    "subject_id": _SUBJECT,
    "path": Column(TEXT, "below mimic_cxr"),
    "taken_at": Column(TIME, group="time"),
    "view": Column(TEXT, group="view"),
    "view_source": Column(TEXT, "ViewPosition, ViewCodeSequence", "link"),
    "position": Column(TEXT, group="position"),
    "split": _SPLIT,
    **_link("hadm_id", "; icustays, edstays: named there"),
    **_link("stay_id"),
    **_link("ed_stay_id"),
    "sex": Column(TEXT, "M, F", "sex"),
    "age_years": Column(REAL, "years", "age", low=0),
    "age_capped": Column("boolean", "above 89", "age"),
    "in_icu": Column(INT, "0, 1", "icu", among=(0, 1)),
    "icu_los_days": Column(REAL, "days", "outcome", "discharge"),
    "died_in_hospital": Column(INT, "0, 1", "mortality", "discharge", among=(0, 1)),
    "race": Column(TEXT, group="subgroup", available_at="admission"),
    "insurance": Column(TEXT, group="subgroup", available_at="admission"),
    "language": Column(TEXT, group="subgroup", available_at="admission"),
    "anchor_year_group": Column(TEXT, group="subgroup"),
    **{name: Column(REAL, unit, "ed_triage") for name, unit in _VITAL_UNITS.items()},
    "arrival_transport": Column(TEXT, group="arrival"),
    "hours_since_ed_arrival": Column(REAL, "hours", "arrival"),
    "hours_since_hospital_arrival": Column(REAL, "hours", "arrival"),
    "hours_since_icu_arrival": Column(REAL, "hours", "arrival"),
    "num_prior_studies": Column(REAL, "studies", "prior_films"),
    "hours_since_prior_study": Column(REAL, "hours", "prior_films"),
    "num_prior_admissions": Column(REAL, "admissions", "prior_diagnoses"),
    "prior_phenotypes": Column(TEXT, "CCS groups of earlier admissions", "prior_diagnoses"),
    "msn_died": Column(INT, "0, 1, by calendar date", "mortality (msn)", "discharge", among=(0, 1)),
    "msn_in_icu": Column(
        INT, "0, 1, by calendar date: also a stay that begins later that day", "icu (msn)", "discharge", among=(0, 1)
    ),
    **{name: Column(REAL, "1, 0, -1 uncertain", "finding", among=(1, 0, -1)) for name in FINDINGS},
}
SAMPLES: dict[str, Column] = {
    "sample_id": _id(TEXT, unique=True),
    "stay_id": Column(INT, low=0),
    "subject_id": _SUBJECT,
    "split": _SPLIT,
    "predict_at_hours": Column(REAL, "hours since intime", "time", low=0),
    "dicom_id": Column(TEXT),
    "code_status": Column(TEXT, group="subgroup"),
}
NOTES: dict[str, Column] = {  # written by notes/write.py
    "dicom_id": _id(TEXT, unique=True),
    "subject_id": _SUBJECT,
    "split": _SPLIT,
    "hadm_id": Column(INT, group="link", low=0),
    "ed_stay_id": Column(INT, "the visit that the note tells of", "link", low=0),
    "taken_at": Column(TIME, group="time"),
    "note": Column(TEXT, "sections, one a line", "text"),
    "sections": Column("list<struct<name: string, text: string>>", group="text"),
    "sources": Column("list<string>", "tables that the note's facts are from", "text"),
    "available_at": Column(TIME, "when the last fact was known", "time", null=False),
    "num_removed": Column(INT, "terms that the leak filter took out", "text"),
}
TABLES: dict[str, dict[str, Column]] = {  # name -> columns; samples/TASK has SAMPLES and the labels of its task
    "images": IMAGES,
    "stays": STAYS,
    "stay_films": STAY_FILMS,
    "notes": NOTES,
}
KEYS = {"stay_films": ("stay_id", "dicom_id")}  # columns that together stand once
NEVER_EMPTY = ("images", "stays")
FOR_NOTES = frozenset({"medrecon", "pyxis"})  # tables that `build` never reads


def described(columns: Mapping[str, Column]) -> dict[str, dict[str, Any]]:
    """The entry of a table in schema.json."""
    return {
        name: {"type": c.type, "unit": c.unit, "group": c.group, "available_at": c.available_at}
        for name, c in columns.items()
    }
