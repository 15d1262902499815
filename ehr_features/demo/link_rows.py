"""Rows of labevents, chartevents and vitalsign for the values that record_link.py planted before each film.

An older, unrelated value between a planted one and its film would be the last one known, so it is taken out; laboratory
values of planted items are taken out of the 24 hours before a film, so that a missing value is missing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ehr_features.demo.people import People
from ehr_features.demo.record_link import BEDSIDE, VALUES, Planted
from ehr_features.demo.tables import CHART, LAB
from ehr_features.demo.truth import Array

WINDOW = np.timedelta64(24, "h")
DEVICES = ("Nasal cannula", "Endotracheal tube")  # the ventilator value, 0 and 1
LABS = [name for name in VALUES if name not in BEDSIDE]


def with_planted_labs(labs: pd.DataFrame, people: People) -> pd.DataFrame:
    """Labevents with the planted values."""
    if (planted := people.planted) is None:
        return labs
    studies, items = people.studies, [VALUES[name].item for name in LABS]
    following = _following_film(labs, studies, "subject_id")
    recent = (following - labs["charttime"].to_numpy()) <= WINDOW  # NaT: False
    labs = labs[~(labs["itemid"].isin(items).to_numpy() & recent)]
    values, _ = _readings(planted, LABS)
    row, column = np.nonzero(~np.isnan(values))
    number, of = values[row, column], [VALUES[LABS[k]] for k in column]
    place = [list(VALUES).index(LABS[k]) for k in column]
    hadm = studies["stay_id"].map(people.stays.set_index("stay_id")["hadm_id"]).astype("Int64")
    table = pd.DataFrame(
        {
            "labevent_id": int(labs["labevent_id"].max()) + 1 + np.arange(len(row))
            if len(labs)
            else np.arange(len(row)),
            "subject_id": studies["subject_id"].to_numpy()[row],
            "hadm_id": hadm.array[row],
            "specimen_id": 30_000_000 + row,
            "itemid": [value.item for value in of],
            "order_provider_id": None,
            "charttime": planted.charted[row, place],
            "storetime": planted.stored[row, place],
            "value": [f"{v:.10g}" for v in number],
            "valuenum": number,
            "valueuom": [value.unit for value in of],
            "ref_range_lower": [value.normal[0] for value in of],
            "ref_range_upper": [value.normal[1] for value in of],
            "priority": "STAT",
            "comments": None,
        }
    )
    beyond = (table["valuenum"] > table["ref_range_upper"]) | (table["valuenum"] < table["ref_range_lower"])
    table["flag"] = pd.Series("abnormal", table.index).where(beyond)
    return pd.concat([labs.astype({"hadm_id": "Int64"}), table[LAB].astype({"hadm_id": "Int64"})], ignore_index=True)


def with_planted_chart(chart: pd.DataFrame, people: People) -> pd.DataFrame:
    """Chartevents with the planted saturation and oxygen device of ICU films."""
    if (planted := people.planted) is None:
        return chart
    studies = people.studies
    inside = studies["stay_id"].notna().to_numpy()
    values, place = _readings(planted, BEDSIDE)
    saturation = inside & ~np.isnan(values[:, 0])
    film, begin = studies["time"].to_numpy(), planted.charted[:, place[0]]
    keep = ~((chart["itemid"] == VALUES["spo2"].item).to_numpy() & _between(chart, studies, saturation, begin, film))
    row, column = np.nonzero(~np.isnan(values) & inside[:, None])
    stays = people.stays.reset_index(names="at").set_index("stay_id").loc[studies["stay_id"].to_numpy()[row]]
    number, device = values[row, column], column == BEDSIDE.index("ventilator")
    names = [BEDSIDE[k] for k in column]
    words = np.where(device, np.array(DEVICES)[np.where(device, number, 0).astype(int)], [f"{v:.10g}" for v in number])
    table = pd.DataFrame(
        {
            "subject_id": studies["subject_id"].to_numpy()[row],
            "hadm_id": stays["hadm_id"].to_numpy(),
            "stay_id": stays.index.to_numpy(),
            "caregiver_id": 10_000 + stays["at"].to_numpy() * 7 % 3000,
            "charttime": planted.charted[row, place[column]],
            "storetime": planted.stored[row, place[column]],
            "itemid": [VALUES[name].item for name in names],
            "value": words,
            "valuenum": np.where(device, np.nan, number),
            "valueuom": [VALUES[name].unit or None for name in names],
            "warning": 0,
        }
    )
    for name in ("value", "valueuom"):  # categories, as in chart
        known = chart[name].cat.categories
        new = pd.Index(table[name].dropna().unique()).difference(known)
        chart[name] = chart[name].cat.add_categories(new)
        table[name] = pd.Categorical(table[name], categories=chart[name].cat.categories)
    table = table[CHART].astype({"stay_id": chart["stay_id"].dtype, "hadm_id": chart["hadm_id"].dtype})
    return pd.concat([chart[keep], table], ignore_index=True)


def with_planted_signs(vital: pd.DataFrame, people: People, signs: pd.DataFrame) -> pd.DataFrame:
    """Vitalsign with a row before each film of a visit that has a planted saturation.

    Args:
        signs: other signs of these rows, one for each study, in order.
    """
    if (planted := people.planted) is None:
        return vital
    studies = people.studies
    values, place = _readings(planted, ("spo2",))
    seen = studies["ed_stay_id"].notna().to_numpy() & ~np.isnan(values[:, 0])
    begin, film = planted.charted[:, place[0]], studies["time"].to_numpy()
    named = studies.drop(columns="stay_id").rename(columns={"ed_stay_id": "stay_id"})
    keep = ~_between(vital, named, seen, begin, film)
    table = signs[seen].assign(
        subject_id=studies["subject_id"].to_numpy()[seen],
        stay_id=studies["ed_stay_id"].to_numpy()[seen],
        charttime=begin[seen],
        o2sat=pd.array(values[seen, 0]).astype("Int64"),
        rhythm=None,
        pain=None,
    )
    both = pd.concat([vital[keep], table.astype({"stay_id": vital["stay_id"].dtype})[list(vital.columns)]])
    return both.sort_values(["subject_id", "stay_id", "charttime"], kind="stable", ignore_index=True)


def _readings(planted: Planted, names: tuple[str, ...] | list[str]) -> tuple[Array, Array]:
    """(studies, len(names)) values in their units, and their columns."""
    place = np.array([list(VALUES).index(name) for name in names])
    return planted.readings()[:, place], place


def _following_film(rows: pd.DataFrame, studies: pd.DataFrame, key: str) -> Array:
    """The time of the first film at or after each row's charttime, of the same subject or stay; NaT: none."""
    films = studies[[key, "time"]].dropna().astype({key: "int64"}).sort_values("time")
    films["time"] = films["time"].astype("datetime64[s]")
    order = rows[[key]].astype({key: "int64"}).assign(charttime=rows["charttime"].astype("datetime64[s]").to_numpy())
    order = order.assign(at=np.arange(len(order))).sort_values("charttime", kind="stable")
    found = pd.merge_asof(order, films.assign(film=films["time"]), left_on="charttime", right_on="time", by=key,
                          direction="forward")  # fmt: skip
    out: Array = np.empty(len(rows), "datetime64[s]")
    out[found["at"]] = found["film"].to_numpy().astype("datetime64[s]")
    return out


def _between(rows: pd.DataFrame, studies: pd.DataFrame, some: Array, begin: Array, film: Array) -> Array:
    """(rows,) bool: charted in [begin, film] of one of some studies of the row's stay."""
    chosen = studies.loc[some, ["stay_id"]].assign(time=film[some])
    following = _following_film(rows, chosen, "stay_id")
    starts = chosen.astype({"stay_id": "int64", "time": "datetime64[s]"}).assign(begin=begin[some])
    wanted = pd.DataFrame({"stay_id": rows["stay_id"].to_numpy("int64"), "time": following})
    found = wanted.merge(starts.drop_duplicates(["stay_id", "time"]), "left", ["stay_id", "time"])
    return np.asarray(rows["charttime"].to_numpy() >= found["begin"].to_numpy())  # NaT: False
