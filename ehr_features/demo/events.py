"""Hourly chart rows and laboratory rows of the synthetic ICU stays, as arrays over (stay, hour)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ehr_features.demo.link_rows import with_planted_chart, with_planted_labs
from ehr_features.demo.people import People, channel_levels
from ehr_features.demo.plan import Plan
from ehr_features.demo.tables import CHART, EYE, ITEMS, LAB, LABS, MOTOR, REFILL, VERBAL, write_csv
from ehr_features.demo.truth import CHANNELS, Array
from ehr_features.series.channels import SPECIMEN_TYPE

# channel: mean, gain on the channel's level, standard deviation of a value
VITALS = {
    "hr": (86, 7.0, 6.0),
    "rr": (19, 2.2, 2.5),
    "temp": (36.95, 0.28, 0.22),
    "spo2": (96.6, -1.1, 1.0),
    "fio2": (43, 6.0, 4.0),
    "glucose": (135, 16.0, 14.0),
    "ph": (7.385, -0.03, 0.025),
}


class _Rows:
    """Chart rows, collected column by column; `hours` may be fractions."""

    def __init__(self) -> None:
        self.parts: list[tuple[Array, Array, Array, Array]] = []

    def add(self, stay: Array, hours: Array, item: int | Array, number: Array, digits: int = 0) -> None:
        """Numbers of one item (or an item for each row)."""
        self.parts.append((stay, hours, np.broadcast_to(item, stay.shape), np.round(number, digits)))


def write_events(people: People, plan: Plan, hosp: Path, icu: Path) -> dict[str, int]:
    """Write icu/chartevents and hosp/labevents."""
    rng = np.random.default_rng([plan.seed, 3])
    stays = people.stays
    length = np.ceil(stays["hours"].to_numpy()).astype(int)
    stay = np.repeat(np.arange(len(stays)), length)
    hour = np.arange(len(stay)) - np.repeat(np.cumsum(length) - length, length)
    level = _levels(rng, people, plan, stay, hour + 0.5)
    chart = with_planted_chart(_chart(rng, people, stay, hour, level), people)
    labs = with_planted_labs(lab_rows(rng, people, stay, hour, level), people)
    return {
        "icu/chartevents": write_csv(chart, icu / "chartevents.csv.gz", plain=True),
        "hosp/labevents": write_csv(labs, hosp / "labevents.csv.gz"),
    }


def _levels(rng: np.random.Generator, people: People, plan: Plan, stay: Array, hours: Array) -> dict[str, Array]:
    """Level of each channel at each hour: latents, slow waves, and a rise before death in the ICU."""
    level = channel_levels(people.record[people.stays["admission"].to_numpy()[stay]], hours)
    count = len(people.stays)
    for k in range(len(CHANNELS)):
        period, phase = rng.uniform(9, 26, count)[stay], rng.uniform(0, 2 * np.pi, count)[stay]
        level[:, k] += 0.35 * np.sin(2 * np.pi * hours / period + phase)
    if not plan.shuffled:  # starts 14 h before a death at 62 h or later, so that the first 48 h do not show it
        left = people.stays["hours"].to_numpy()[stay] - hours
        inside = (people.stays["deathtime"] == people.stays["outtime"]).to_numpy()[stay] & (
            people.stays["hours"].to_numpy()[stay] > 61
        )
        level += (inside * np.clip(14 - left, 0, 14) / 14 * 1.5)[:, None]
    return {name: level[:, k] for k, name in enumerate(CHANNELS)}


def _chart(rng: np.random.Generator, people: People, stay: Array, hour: Array, level: dict[str, Array]) -> pd.DataFrame:
    rows = _Rows()
    count, total = len(people.stays), len(stay)

    def vital(name: str) -> Array:
        mean, gain, sd = VITALS[name]
        return mean + gain * level[name] + sd * rng.standard_normal(total)

    def some(probability: float | Array) -> Array:
        return np.flatnonzero(rng.random(total) < probability)

    def add(where: Array, item: int | Array, number: Array, digits: int = 0) -> None:
        minute = rng.integers(0, 60, len(where)) if rng.random() < 0.5 else np.zeros(len(where))
        rows.add(stay[where], hour[where] + minute / 60, item, number[where], digits)

    add(some(0.93), 220045, np.clip(vital("hr"), 25, 220))
    rr, ventilated = np.clip(vital("rr"), 4, 60), rng.random(count) < 0.45
    add(some(0.90), 220210, rr)
    add(some(0.35 * ventilated[stay]), 224690, rr + rng.integers(-1, 2, total))
    add(some(0.90), 220277, np.clip(vital("spo2"), 60, 100))
    systolic = np.clip(122 - 8.5 * level["bp"] + 8 * rng.standard_normal(total), 40, 230)
    diastolic = np.clip(63 - 4.5 * level["bp"] + 5 * rng.standard_normal(total), 20, 140)
    mean = (systolic + 2 * diastolic) / 3 + rng.standard_normal(total)
    arterial = rng.random(count) < 0.4
    for probability, items, shift in (
        (0.85 * arterial[stay], (220050, 220051, 220052), 2.0),
        (0.85 - 0.5 * arterial[stay], (220179, 220180, 220181), 0.0),
    ):
        where = some(probability)
        for item, number in zip(items, (systolic, diastolic, mean), strict=True):
            keep = where[rng.random(len(where)) < 0.98]
            rows.add(stay[keep], hour[keep].astype(float), item, np.round(number[keep] + shift))
    celsius, temp = rng.random(count) < 0.3, np.clip(vital("temp"), 31, 42)
    where = some(0.3)
    rows.add(
        stay[where],
        hour[where].astype(float),
        np.where(celsius[stay[where]], 223762, 223761),
        np.where(celsius[stay[where]], temp[where], temp[where] * 1.8 + 32),
        1,
    )
    fio2, fraction = (
        np.clip(vital("fio2"), 21, 100),
        rng.random(count) < 0.2,
    )  # charted as a fraction or as a percentage
    where = some(0.3 * ventilated[stay])
    rows.add(
        stay[where],
        hour[where].astype(float),
        223835,
        np.where(fraction[stay[where]], np.round(fio2[where]) / 100, np.round(fio2[where])),
        2,
    )
    glucose = np.clip(vital("glucose"), 25, 600)
    add(some(0.18), 225664, glucose)
    add(some(0.05), 220621, glucose)
    add(some(0.10 * ventilated[stay]), 223830, np.clip(vital("ph"), 6.8, 7.8), 2)
    _texts(rng, rows, stay, hour, level, ventilated)
    _bodies(rng, rows, people)
    _oddities(rng, rows, people, stay, hour)
    return _chart_table(rng, rows, people)


def _texts(
    rng: np.random.Generator, rows: _Rows, stay: Array, hour: Array, level: dict[str, Array], ventilated: Array
) -> None:
    """GCS parts every four hours (numbers 1-6 that `_chart_table` turns into words) and capillary refill."""
    where = np.flatnonzero((hour % 4 == 0) & (rng.random(len(stay)) < 0.9))
    who, depth = stay[where], level["gcs"][where]

    def grade(cuts: tuple[float, ...]) -> Array:
        noisy = depth + 0.45 * rng.standard_normal(len(where))
        return 1 + (noisy[:, None] < np.array(cuts)).sum(1)

    at = hour[where].astype(float)
    rows.add(who, at, 220739, grade((2.2, 1.3, 0.4)))
    verbal = grade((2.0, 1.4, 0.9, 0.2)).astype(float)
    intubated = ventilated[who] & (rng.random(len(who)) < 0.7)
    rows.add(who, at, 223900, np.where(intubated, 0, verbal))  # 0: No Response-ETT
    rows.add(who, at, 223901, grade((2.8, 2.3, 1.9, 1.4, 0.8)))
    where = np.flatnonzero((hour % 8 == 1) & (rng.random(len(stay)) < 0.6))
    slow = level["bp"][where] + 0.8 * rng.standard_normal(len(where)) > 1.3
    word = np.where(
        slow, rng.choice([2, 5], len(where), p=[0.9, 0.1]), rng.choice([1, 3, 4], len(where), p=[0.8, 0.1, 0.1])
    )
    rows.add(stay[where], hour[where].astype(float), rng.choice([223951, 224308], len(where)), word)


def _bodies(rng: np.random.Generator, rows: _Rows, people: People) -> None:
    """Height and weight on arrival, in either unit or missing; daily weights; code status."""
    count = len(people.stays)
    male = people.stays["male"].to_numpy(float)
    height, weight = (
        162 + 13 * male + 7 * rng.standard_normal(count),
        np.clip(70 + 13 * male + 16 * rng.standard_normal(count), 38, 180),
    )
    every = np.arange(count)
    inches, centimetres = rng.random(count) < 0.6, rng.random(count) < 0.5
    rows.add(every[inches], np.full(inches.sum(), 0.3), 226707, height[inches] / 2.54)
    rows.add(every[centimetres], np.full(centimetres.sum(), 0.3), 226730, height[centimetres])
    pounds = rng.random(count) < 0.3
    rows.add(every[~pounds], np.full((~pounds).sum(), 0.2), 226512, weight[~pounds], 1)
    rows.add(every[pounds], np.full(pounds.sum(), 0.2), 226531, weight[pounds] / 0.453592, 1)
    for day in (1, 2, 3):
        rest = np.flatnonzero((people.stays["hours"].to_numpy() > 24 * day + 6) & (rng.random(count) < 0.6))
        rows.add(rest, np.full(len(rest), 24.0 * day + 5), 224639, weight[rest] + rng.standard_normal(len(rest)), 1)
    limited = every[rng.random(count) < 0.15]
    rows.add(limited, rng.uniform(1, 40, len(limited)), 223758, np.ones(len(limited)))


def _oddities(rng: np.random.Generator, rows: _Rows, people: People, stay: Array, hour: Array) -> None:
    """Errors of real charts: impossible values, rows outside the stay, Fahrenheit under the Celsius item."""
    count, hours = len(people.stays), people.stays["hours"].to_numpy()

    def pick(number: int) -> Array:
        return rng.integers(0, count, max(3, round(number * count / 700)))

    for item, value in (
        (220045, 0.0),
        (220277, 0.0),
        (220277, 9999.0),
        (220210, 2355560.0),
        (220179, 0.0),
        (223761, 0.0),
        (223835, 0.0),
        (226512, 0.0),
    ):
        who = pick(8)
        rows.add(who, rng.uniform(0, 1, len(who)) * np.minimum(hours[who], 40), item, np.full(len(who), value))
    who = pick(10)
    rows.add(who, rng.uniform(0, 9, len(who)), 223762, np.full(len(who), 98.2), 1)
    for after in (True, False):
        who = pick(30)
        at = np.where(after, hours[who] + rng.uniform(0.2, 20, len(who)), -rng.uniform(0.2, 6, len(who)))
        rows.add(
            who, at, rng.choice([220045, 220277], len(who)), np.clip(95 + 3 * rng.standard_normal(len(who)), 60, 100)
        )
    who = np.concatenate([pick(60), pick(60)])
    rows.add(who, rng.uniform(0, 9, len(who)), 220001, np.ones(len(who)))


def _chart_table(rng: np.random.Generator, rows: _Rows, people: People) -> pd.DataFrame:
    stay, hours, item, number = (np.concatenate(part) for part in zip(*rows.parts, strict=True))
    seconds = np.round(hours * 60).astype(np.int64) * 60
    order = np.lexsort((item, seconds, stay))
    stay, seconds, item, number = stay[order], seconds[order], item[order], number[order]
    keys = people.stays.iloc[stay]
    start = keys["intime"].to_numpy().astype("datetime64[h]").astype("datetime64[s]")  # chart times are whole hours
    start = np.where(
        seconds < 3600,
        keys["intime"].to_numpy().astype("datetime64[s]"),
        start + np.timedelta64(3600, "s") * (seconds >= 3600),
    )
    charttime = start + np.where(seconds < 3600, seconds, seconds - 3600).astype("timedelta64[s]")
    kinds, place = np.unique(np.stack([item.astype(float), number]), axis=1, return_inverse=True)
    words = np.array([_word(int(i), v) for i, v in kinds.T], object)
    units = np.array([ITEMS[int(i)][1] or None for i in kinds[0]], object)
    numeric = np.array(
        [
            np.nan if int(i) in (223951, 224308, 223758, 220001) else max(v, 1.0) if int(i) == 223900 else v
            for i, v in kinds.T
        ]
    )
    place = place.ravel()
    table = pd.DataFrame({name: keys[name].to_numpy() for name in ("subject_id", "hadm_id", "stay_id")})
    table["caregiver_id"] = 10_000 + people.stays.index.to_numpy()[stay] * 7 % 3000
    table["charttime"] = charttime
    table["storetime"] = charttime + (rng.integers(60, 2400, len(table))).astype("timedelta64[s]")
    table["itemid"] = item.astype(int)
    table["value"] = _categories(words, place)
    table["valuenum"] = numeric[place]
    table["valueuom"] = _categories(units, place)
    table["warning"] = 0
    return table[CHART]


def _categories(words: Array, place: Array) -> pd.Categorical:
    """A text column whose row i is words[place[i]]; None is missing."""
    codes, known = pd.factorize(words)
    return pd.Categorical.from_codes(codes[place], categories=pd.Index(known))


def _word(item: int, number: float) -> str:
    """The text that MIMIC would show in the column `value`."""
    texts = {220739: EYE, 223901: MOTOR, 223951: REFILL, 224308: REFILL}
    if item in texts:
        return texts[item][int(number) - 1]
    if item == 223900:
        return "No Response-ETT" if number == 0 else VERBAL[int(number) - 1]
    if item in (223758, 220001):
        return "DNR (do not resuscitate)" if item == 223758 else "Review"
    return f"{number:.10g}"


# ---- Laboratory rows


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
    gas = [item for item, row in LABS.items() if row[2] == "Blood Gas"]
    types = table[table["itemid"].isin(gas)].drop_duplicates("specimen_id")
    kinds = np.where(types["row"] % 5 == 0, "VEN.", "ART.")
    types = types.assign(itemid=SPECIMEN_TYPE, value=kinds, labevent_id=types["labevent_id"] + len(table))
    empty = ["valuenum", "valueuom", "ref_range_lower", "ref_range_upper", "flag", "comments"]
    return pd.concat([table, types.assign(**dict.fromkeys(empty, None))])[LAB]
