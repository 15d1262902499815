"""The laboratory rows of the synthetic ICU stays."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ehr_features.demo_people import People
from ehr_features.demo_tables import LAB, LABS
from ehr_features.demo_truth import Array


def lab_rows(
    rng: np.random.Generator, people: People, stay: Array, hour: Array, level: dict[str, Array]
) -> pd.DataFrame:
    """A panel about every seven hours; results are stored later; some rows carry no hadm_id."""
    draw = np.flatnonzero(rng.random(len(stay)) < 0.14)
    parts = []
    for item, (_, fluid, _, unit, mean, gain, channel, digits, low, high) in LABS.items():
        where = draw[rng.random(len(draw)) < (0.85 if fluid == "Blood" else 0.06)]
        value: Array = mean + gain * level[channel][where] + 0.8 * abs(gain) * rng.standard_normal(len(where))
        value = np.round(np.clip(value, mean * 0.15, 100 if item == 50817 else mean * 6), digits)
        parts.append(
            pd.DataFrame(
                {
                    "row": where,
                    "itemid": item,
                    "valuenum": value,
                    "valueuom": unit,
                    "ref_range_lower": low,
                    "ref_range_upper": high,
                    "digits": digits,
                }
            )
        )
    table = pd.concat(parts).sort_values(["row", "itemid"], ignore_index=True)
    keys = people.stays.iloc[stay[table["row"]]].reset_index(drop=True)
    minute = rng.integers(0, 60, len(stay))[table["row"]]
    table["charttime"] = keys["intime"].to_numpy() + ((hour[table["row"]] * 60 + minute) * 60).astype("timedelta64[s]")
    table["storetime"] = table["charttime"] + rng.integers(10 * 60, 170 * 60, len(table)).astype("timedelta64[s]")
    text = table["valuenum"].map("{:.10g}".format)
    table["value"] = text.mask(rng.random(len(table)) < 0.01, "___")
    nothing = rng.random(len(table)) < 0.005
    table["valuenum"] = table["valuenum"].mask(nothing)
    table["value"] = table["value"].mask(nothing, "HEMOLYZED")
    beyond = (table["valuenum"] > table["ref_range_upper"]) | (table["valuenum"] < table["ref_range_lower"])
    table["flag"] = pd.Series("abnormal", table.index).where(beyond)
    table["subject_id"] = keys["subject_id"]
    outside = rng.random(len(stay))[table["row"]] < 0.05
    table["hadm_id"] = keys["hadm_id"].astype("Int64").mask(outside)
    table["labevent_id"], table["specimen_id"] = np.arange(1, len(table) + 1), 10_000_000 + table["row"]
    table["order_provider_id"] = None
    table["priority"] = rng.choice(["ROUTINE", "STAT"], len(table))
    note = 'Fasting? "Not known", ranges for adults.\nSee the handbook, page 3.'
    table["comments"] = pd.Series(note, table.index).where(rng.random(len(table)) < 0.02)
    return table[LAB]
