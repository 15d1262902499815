"""Map ICD codes to the 25 phenotypes (CCS groups).

Input: diagnoses of admissions, phenotypes.csv, icd10_branches.csv. Output: phenotype_2 ... phenotype_249 of each stay's
admission, and counts of mapped and unmapped codes.

icd10_branches.csv is derived from AHRQ's CCS for ICD-10-CM (2019.1, 72,446 codes): the shortest prefixes under which
all codes belong to the same of the 25 groups, or to none (0). With it, codes newer than 2019.1 can be mapped.
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
BRANCHES = Path(__file__).with_name("icd10_branches.csv")
VERSIONS = (9, 10)


def groups() -> list[int]:
    """The CCS ids of the 25 phenotypes."""
    return sorted(pd.read_csv(PHENOTYPES, usecols=["ccs"])["ccs"].unique().tolist())


def group_codes(codes: pd.DataFrame, preset: str) -> pd.DataFrame:
    """The group of each ICD code.

    Args:
        codes: icd_code, icd_version; distinct.
        preset: `default`: by code and version; an ICD-10 code that is not in the tables takes the group that all their
            codes under its longest known prefix share. `medfuse`: by code alone, the published list.
    Returns: icd_code, icd_version, ccs (null: in none of the groups), how (exact | prefix | other | unmapped: an ICD-10
        code whose prefix is of several groups, or unknown).
    """
    table = _listed(preset)
    codes = codes.astype({"icd_version": "Int64"})
    codes = codes.assign(plain=_plain(codes["icd_code"]))
    keys = ["plain"] if preset == "medfuse" else ["plain", "icd_version"]
    known = table.rename(columns={"icd_code": "plain"})[[*keys, "ccs"]].drop_duplicates()
    found = codes.merge(known, on=keys, how="left")
    found["how"] = np.where(found["ccs"].notna(), "exact", "other")
    if preset == "medfuse":
        return found.drop(columns="plain")
    branches = pd.read_csv(BRANCHES, index_col="prefix")["ccs"].to_dict()  # 0: none of the 25
    branches |= known[known["icd_version"] == 10].set_index("plain")["ccs"].to_dict()
    for row in found.index[found["ccs"].isna() & (found["icd_version"] == 10)]:
        code = str(found.at[row, "plain"])
        group = next((branches[code[:n]] for n in range(len(code), 0, -1) if code[:n] in branches), None)
        found.at[row, "how"] = "unmapped" if group is None else "prefix" if group else "other"
        found.at[row, "ccs"] = group or np.nan
    return found.drop(columns="plain")


def lost_zeros(source: Source) -> list[str]:
    """A warning if ICD-9 codes have lost their leading zeros: 389 is unknown, 0389 is a code."""
    if not source.has("diagnoses_icd"):
        return []
    written = source.table("diagnoses_icd").filter(_.icd_version == 9).icd_code.value_counts(name="n").to_pandas()
    written = written.assign(code=_plain(written["icd_code"])).dropna()
    table = _listed("default")
    known = set(table.loc[table["icd_version"] == 9, "icd_code"])
    kept = set()
    if source.has("d_icd_diagnoses"):
        kept = set(_plain(source.table("d_icd_diagnoses").filter(_.icd_version == 9).icd_code.to_pandas()).dropna())
    if any(code.startswith("0") for code in kept):
        known |= kept
    elif written["code"].str.startswith("0").any():  # without a dictionary, warn only if all leading zeros are lost
        return []
    lost = ~written["code"].isin(known) & written["code"].map(lambda c: {f"0{c}", f"00{c}"} & known).astype(bool)
    if not lost.any():
        return []
    rows = int(written.loc[lost, "n"].sum())
    return [
        f"diagnoses_icd: {rows:,} rows have ICD-9 codes without leading zeros ({lost.sum()} codes; 389 stands for "
        "0389), which match no group; was the table saved with icd_code as a number?"
    ]


def _listed(preset: str) -> pd.DataFrame:
    table = pd.read_csv(PHENOTYPES, dtype={"icd_code": str})
    return table[table["presets"].str.split().map(lambda names: preset in names)]


def _plain(codes: pd.Series) -> pd.Series:
    return codes.str.strip().str.replace(".", "", regex=False).str.upper()


def with_phenotypes(source: Source, stays: ir.Table, preset: str, attrition: Attrition) -> ir.Table:
    """Add phenotype_* of the stay's admission."""
    diagnoses = source.table("diagnoses_icd").semi_join(stays, "hadm_id")
    diagnoses = diagnoses.select("hadm_id", "icd_code", "icd_version").filter(_.icd_code.notnull())
    counted = diagnoses.group_by("icd_code", "icd_version").agg(n=_.count()).to_pandas()
    counted = counted.astype({"icd_version": "Int64"})
    mapped = group_codes(counted.drop(columns="n"), preset)
    told = mapped.merge(counted, on=["icd_code", "icd_version"])
    told["icd_version"] = told["icd_version"].where(
        told["icd_version"].isin(VERSIONS)
    )  # other versions are counted as missing
    for (version, how), part in told.groupby(["icd_version", "how"], dropna=False):
        attrition.note(f"ICD-{version} diagnoses, group by {how}", {"codes": len(part), "rows": int(part["n"].sum())})
    unmapped = told[told["how"] == "unmapped"].sort_values("icd_code")
    attrition.note("unmapped ICD-10 codes", dict(zip(unmapped["icd_code"], unmapped["n"].tolist(), strict=True)))
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
    """Count the admissions of each ICD version that have each group."""
    coded = (
        diagnoses.select("hadm_id", "icd_version")
        .filter(_.icd_version.isin(VERSIONS))
        .distinct()
        .group_by("icd_version")
        .agg(n=_.count())
        .order_by("icd_version")
        .to_pandas()
    )
    positive = has.group_by("icd_version", "ccs").agg(n=_.hadm_id.nunique()).to_pandas()
    for version, n in zip(coded["icd_version"].tolist(), coded["n"].tolist(), strict=True):
        part = positive[positive["icd_version"] == version].set_index("ccs")["n"]
        prevalence = {f"phenotype_{g}": round(int(part.get(g, 0)) / n, 4) for g in groups()}
        attrition.note(f"phenotype prevalence in {n} admissions coded in ICD-{version}", prevalence)
