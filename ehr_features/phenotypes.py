"""ICD codes -> the 25 phenotypes (CCS groups).

Comes in: diagnoses of admissions, phenotypes.csv. Goes out: phenotype_2 ... phenotype_249 of each stay's admission, and
how well the codes were covered.
"""

from __future__ import annotations

from pathlib import Path

import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
from ibis import _

from ehr_features.cohort import Attrition
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source

PHENOTYPES = Path(__file__).with_name("phenotypes.csv")
VERSIONS = (9, 10)


def groups() -> list[int]:
    """The CCS ids of the 25 phenotypes."""
    return sorted(pd.read_csv(PHENOTYPES, usecols=["ccs"])["ccs"].unique().tolist())


def group_codes(codes: pd.DataFrame, preset: str) -> pd.DataFrame:
    """Which of the 25 groups each ICD code belongs to.

    Args:
        codes: icd_code, icd_version; distinct.
        preset: `default`: by code and version; an ICD-10 code that is not in the tables but extends one that is (a
        newer
            subdivision) takes its group, if all codes under that one agree. `medfuse`: by code alone, the published
            list.
    Returns: icd_code, icd_version, ccs (null: in none of the groups), how (exact | prefix | ambiguous | other).
    """
    table = pd.read_csv(PHENOTYPES, dtype={"icd_code": str})
    table = table[table["presets"].str.split().map(lambda names: preset in names)]
    codes = codes.astype({"icd_version": "Int64"})
    codes = codes.assign(plain=codes["icd_code"].str.strip().str.replace(".", "", regex=False).str.upper())
    keys = ["plain"] if preset == "medfuse" else ["plain", "icd_version"]
    known = table.rename(columns={"icd_code": "plain"})[[*keys, "ccs"]].drop_duplicates()
    found = codes.merge(known, on=keys, how="left")
    found["how"] = np.where(found["ccs"].notna(), "exact", "other")
    if preset == "medfuse":
        return found.drop(columns="plain")
    tens = set(known.loc[known["icd_version"] == 10, "plain"])
    by_code = known[known["icd_version"] == 10].groupby("plain")["ccs"].agg(set).to_dict()
    for row in found.index[found["ccs"].isna() & (found["icd_version"] == 10)]:
        code = str(found.at[row, "plain"])
        parent = next((code[:n] for n in range(len(code) - 1, 2, -1) if code[:n] in tens), None)
        if parent is None:
            continue
        under = set().union(*(ccs for known_code, ccs in by_code.items() if str(known_code).startswith(parent)))
        found.at[row, "how"] = "prefix" if len(under) == 1 else "ambiguous"
        if len(under) == 1:
            found.at[row, "ccs"] = under.pop()
    return found.drop(columns="plain")


def with_phenotypes(source: Source, stays: ir.Table, preset: str, attrition: Attrition) -> ir.Table:
    """Add phenotype_* of the stay's admission."""
    diagnoses = source.table("diagnoses_icd").semi_join(stays, "hadm_id")
    diagnoses = diagnoses.select("hadm_id", "icd_code", "icd_version").filter(_.icd_code.notnull())
    counted = diagnoses.group_by("icd_code", "icd_version").agg(n=_.count()).to_pandas()
    counted = counted.astype({"icd_version": "Int64"})
    mapped = group_codes(counted.drop(columns="n"), preset)
    told = mapped.merge(counted, on=["icd_code", "icd_version"])
    told["icd_version"] = told["icd_version"].where(told["icd_version"].isin(VERSIONS))  # no odd value is told
    for (version, how), part in told.groupby(["icd_version", "how"], dropna=False):
        attrition.note(f"ICD-{version} diagnoses, group by {how}", {"codes": len(part), "rows": int(part["n"].sum())})
    attrition.note(
        "ICD-10 codes that no group could be told for", sorted(mapped.loc[mapped["how"] == "ambiguous", "icd_code"])
    )
    keys = ["icd_code"] if preset == "medfuse" else ["icd_code", "icd_version"]
    known = mapped.dropna(subset="ccs")[[*keys, "ccs"]].drop_duplicates()
    types = {"icd_code": "string", "icd_version": "int64", "ccs": "int64"}
    known = known.astype({name: types[name] for name in [*keys, "ccs"]})
    held = hold(source.con, "icd_groups", pa.Table.from_pandas(known, preserve_index=False))
    has = diagnoses.join(held, keys).select("hadm_id", "ccs", "icd_version").distinct()
    _prevalence(diagnoses, has, attrition)
    flags = {f"phenotype_{g}": (_.ccs == g).cast("int64").max() for g in groups()}
    wide = has.group_by("hadm_id").agg(**flags)
    stays = stays.left_join(wide, "hadm_id").drop("hadm_id_right")
    return stays.mutate(**{name: _[name].fill_null(0) for name in flags})


def _prevalence(diagnoses: ir.Table, has: ir.Table, attrition: Attrition) -> None:
    """How many admissions of each ICD version have each group."""
    coded = (
        diagnoses.select("hadm_id", "icd_version")
        .filter(_.icd_version.isin(VERSIONS))
        .distinct()
        .group_by("icd_version")
        .agg(n=_.count())
        .to_pandas()
    )
    positive = has.group_by("icd_version", "ccs").agg(n=_.hadm_id.nunique()).to_pandas()
    for version, n in zip(coded["icd_version"].tolist(), coded["n"].tolist(), strict=True):
        part = positive[positive["icd_version"] == version].set_index("ccs")["n"]
        prevalence = {f"phenotype_{g}": round(int(part.get(g, 0)) / n, 4) for g in groups()}
        attrition.note(f"phenotype prevalence in {n} admissions coded in ICD-{version}", prevalence)
