"""Events -> hourly series: each rule on a small table, and all of them against a naive pandas version."""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from configs import UserError
from ehr_features import series
from ehr_features.files import write_json
from ehr_features.raw.engine import batches, hold
from ehr_features.raw.source import Source
from ehr_features.series import bins, medfuse
from ehr_features.series import file as series_file
from ehr_features.series.channels import SHIPPED, Channel, check_items, read_channels

IN = pd.Timestamp("2150-01-01 10:00:00")
CHANNELS = read_channels()
NAMES = [c.name for c in CHANNELS]
CHART = ["subject_id", "hadm_id", "stay_id", "itemid", "charttime", "storetime", "value", "valuenum"]


def at(hours: float) -> pd.Timestamp:
    return IN + pd.Timedelta(seconds=round(hours * 3600))


def chart(*rows: tuple[Any, ...], stay: int = 1) -> pd.DataFrame:
    """(itemid, hours, value[, text[, stored hours]])"""
    full = [(*row, *[None] * (5 - len(row))) for row in rows]
    out = [
        (
            7,
            5,
            stay,
            item,
            at(h),
            pd.NaT if stored is None else at(stored),
            text if text is not None else str(value),
            value,
        )
        for item, h, value, text, stored in full
    ]
    return pd.DataFrame(out, columns=CHART).astype({"valuenum": float})


def labs(*rows: tuple[Any, ...]) -> pd.DataFrame:
    """(itemid, drawn hours, value, stored hours or None[, hadm_id[, specimen_id]]); a text has no valuenum"""
    out = []
    for item, drawn, value, stored, *more in rows:
        hadm, specimen = (*more, *(5, None)[len(more) :])
        when = (at(drawn), pd.NaT if stored is None else at(stored))
        out.append((7, hadm, specimen, item, *when, str(value), None if isinstance(value, str) else value))
    columns = ["subject_id", "hadm_id", "specimen_id", "itemid", "charttime", "storetime", "value", "valuenum"]
    return pd.DataFrame(out, columns=columns).astype({"valuenum": float, "specimen_id": "Int64"})


def stay(los: float = 6.0, stay_id: int = 1, begins: float = 0.0) -> pd.DataFrame:
    row = {"stay_id": stay_id, "subject_id": 7, "hadm_id": 5, "intime": at(begins), "outtime": at(begins + los)}
    return pd.DataFrame([row | {"los_hours": los}])


def run(
    events: pd.DataFrame | None,
    lab_events: pd.DataFrame | None = None,
    stays: pd.DataFrame | None = None,
    step: int = 1,
    preset: Any = bins,
    channels: tuple[Channel, ...] = CHANNELS,
) -> tuple[dict[int, pd.DataFrame], pd.DataFrame, dict[int, np.ndarray]]:
    """stay_id -> its values by column, the fates of events, stay_id -> observed."""
    stays = stay() if stays is None else stays
    events = chart() if events is None else events
    lab_events = labs() if lab_events is None else lab_events
    source = Source.from_frames({"chartevents": events, "labevents": lab_events, "icustays": stays})
    los = pd.DataFrame({"stay_id": stays["stay_id"], "los_hours": stays["los_hours"].astype(float)})
    los["death_at"] = stays["death_at"] if "death_at" in stays else pd.Series(pd.NaT, los.index, "datetime64[us]")
    los = hold(source.con, "los", pa.Table.from_pandas(los, preserve_index=False))
    cohort = source.table("icustays").join(los, "stay_id")
    binned, fates = preset.extract(
        source, source.table("chartevents"), source.table("labevents"), cohort, channels, step
    )
    columns = preset.layout(channels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "series.safetensors"
        ids = np.sort(stays["stay_id"].to_numpy())
        hours = stays.set_index("stay_id").loc[ids, "los_hours"].to_numpy()
        num = preset.lengths(hours, step)
        ordered = batches(source.con, binned.select(*series_file.BINS).order_by("stay_id"))
        standing = series_file.write(path, ordered, ids, num, columns)
        tensors = load_file(path)
    fates = series_file.fates(fates, standing, exact=preset is bins)
    edges = tensors["offsets"].tolist()
    spans = {int(i): slice(*edge) for i, edge in zip(ids, itertools.pairwise(edges), strict=True)}
    values = {i: pd.DataFrame(tensors["values"][s], columns=list(columns.values)) for i, s in spans.items()}
    return values, fates, {i: tensors["observed"][s] for i, s in spans.items()}


def value(events: pd.DataFrame | None, column: str, lab_events: pd.DataFrame | None = None, **more: Any) -> list[float]:
    return run(events, lab_events, **more)[0][1][column].astype(float).round(4).tolist()


def test_a_bin_begins_at_its_hour_and_its_last_value_wins_then_it_is_carried_forward():
    events = chart((220045, 1.0, 70), (220045, 1.99, 75), (220045, 2.0, 80), (220045, 0.999, 60))
    assert value(events, "heart_rate") == [60, 75, 80, 80, 80, 80]


def test_before_the_first_value_stands_the_normal_value_and_observed_is_zero():
    values, _fates, observed = run(chart((220045, 3.5, 70)))
    assert values[1]["heart_rate"].tolist() == [86, 86, 86, 70, 70, 70]
    assert observed[1][:, NAMES.index("heart_rate")].tolist() == [0, 0, 0, 1, 0, 0]
    assert observed[1].sum() == 1


def test_values_before_intime_and_after_outtime_are_dropped_and_counted():
    events = chart((220045, -0.1, 60), (220045, 5.6, 99), (220045, 9.0, 98))
    values, fates, _ = run(events, stays=stay(5.5))
    assert values[1]["heart_rate"].tolist() == [86] * 6
    assert dict(zip(fates["fate"], fates["n"], strict=True)) == {"before intime": 1, "after outtime": 2}


def test_ties_go_to_the_latest_storetime_then_the_larger_value():
    tied = chart(
        (220045, 1, 90, None, 1.1), (220045, 1, 70, None, 1.2), (220045, 2, 60), (220045, 2, 65), (220045, 2, 62)
    )
    assert value(tied, "heart_rate")[1:3] == [70, 65]
    late = chart((220045, 1, 99), (220045, 1, 61, None, 0.5))
    assert value(late, "heart_rate")[1] == 61  # an empty storetime is older than any


def fates_of(fates: pd.DataFrame, column: str = "n") -> dict[str, int]:
    return {str(fate): int(n) for fate, n in fates.groupby("fate")[column].sum().items() if n}


@pytest.mark.parametrize(
    ("charted", "drawn", "hours", "fate"),
    [
        # (itemid, charttime, value, text, storetime), (itemid, charttime, value, storetime), observed hours
        (None, (50931, 0.5, 150, 2.5), [2], "used"),
        (None, (50809, -1, 150, 0.2), [0], "used"),  # drawn before the stay, reported in it
        (None, (50820, 3, 7.2, 1), [3], "used"),  # stored before it was drawn
        (None, (50931, 3.2, 150, None), [], "no report time"),
        (None, (50931, 3.2, 150, 9), [], "after outtime"),
        ((220621, 1, 150, None, 3.2), None, [3], "used"),
        ((226537, 1, 150, None, 0.2), None, [1], "used"),
        ((228388, 1, 150, None, 9), None, [], "after outtime"),
        ((223830, 1, 7.2), None, [], "no report time"),
        ((220274, 1, 7.2), (50820, 1, 7.2, 4), [4], "used"),  # reported when the row that it copies was
        ((220227, 1, 97), (50817, 1, 97, 4), [4], "used"),
        ((220621, 1, 150), (50931, 1, 150, 0.5), [1], "used"),
        ((220621, 1, 150), (50931, 1, 151, 4), [4], "no report time"),  # another value
        ((220621, 1, 150), (50931, 1.2, 150, 4), [4], "no report time"),  # another draw
        ((220621, 1, 150), (50809, 1, 150, 4), [4], "no report time"),  # another analyte
        ((220621, 1, 150), (50931, 1, 150, None), [], "no report time"),
        ((225664, 1, 150), (50931, 1, 150, 4), [1, 4], "used"),  # a finger stick is no copy
        ((225664, 1, 150, None, 3), None, [1], "used"),
        ((220277, 1, 97, None, 3), None, [1], "used"),
        ((223835, 1, 50, None, 0.5), None, [1], "used"),
    ],
)
def test_a_value_counts_from_when_it_was_known(charted, drawn, hours, fate):
    _values, fates, observed = run(chart(*[charted] * bool(charted)), arterial(*[drawn] * bool(drawn)))
    assert np.flatnonzero(observed[1].any(1)).tolist() == hours
    assert fate in set(fates["fate"]) and fates["n"].sum() == bool(charted) + bool(drawn)


def test_the_fallback_to_the_report_of_the_copied_row_is_counted():
    charted = chart((220621, 1, 150), (220621, 2, 160), (220621, 3, 170, None, 3.5), (225664, 4, 180))
    _values, fates, _ = run(charted, labs((50931, 1, 150, 1.5)))
    assert fates_of(fates, "unstored") == {"used": 1, "no report time": 1}


def arterial(*rows: tuple[Any, ...], kind: str | None = "ART.") -> pd.DataFrame:
    """Laboratory rows of one specimen, with its kind."""
    rows = tuple((*row, 5, 99) for row in rows)
    return labs(*rows, *([(52033, rows[0][1], kind, rows[0][3], 5, 99)] if rows and kind else []))


@pytest.mark.parametrize(
    ("kind", "saturation", "ph"),
    [
        ("ART.", "used", "used"),
        (" art", "used", "used"),
        ("VEN.", "other specimen", "used"),
        ("MIX.", "other specimen", "used"),
        ("CENTRAL VENOUS.", "other specimen", "used"),
        ("CORD.", "other specimen", "other specimen"),
        ("FLUID", "other specimen", "other specimen"),
        (None, "unknown specimen", "used"),
    ],
)
def test_only_the_declared_specimens_count(kind, saturation, ph):
    drawn = arterial((50817, 1, 66, 1.5), (50820, 1, 7.2, 1.5), (50931, 1, 150, 1.5), kind=kind)
    copied = chart((220227, 1, 66), (220277, 0.5, 97))
    values, fates, _ = run(copied, drawn)
    by_channel = fates.groupby(fates["channel"].map(dict(enumerate(NAMES))))["fate"].agg(set)
    assert saturation in by_channel["oxygen_saturation"] and ph in by_channel["ph"] and "glucose" in by_channel
    copy_stands = kind is None or saturation == "used"  # the copy's label says arterial, a known kind overrules it
    assert values[1]["oxygen_saturation"][1] == (66 if copy_stands else 97)


def test_a_specimen_of_two_kinds_is_unknown():
    both = pd.concat([arterial((50817, 1, 66, 1.5)), arterial((50817, 1, 66, 1.5), kind="VEN.")])
    assert fates_of(run(None, both)[1]) == {"unknown specimen": 2}


@pytest.mark.parametrize("text", ["144", " 144.0 ", "+144", "144."])
def test_a_text_that_is_a_plain_number_is_read(text):
    assert value(chart((220045, 1, None, text)), "heart_rate")[1] == 144
    assert value(None, "glucose", labs((50931, 1, text, 1.5)))[1] == 144
    assert value(chart((220621, 1, 144)), "glucose", labs((50931, 1, text, 3)))[2:4] == [128, 144]


@pytest.mark.parametrize("text", [">400", "1e2", "14 4", "144 mg/dL", "___", "-", ".", "NaN", "1,44", "ERROR", ""])
def test_other_texts_are_no_numbers_and_counted(text):
    assert fates_of(run(chart((220045, 1, None, text)), labs((50931, 1, text, 1.5)))[1]) == {"no number": 2}
    assert fates_of(run(chart((223951, 1, None, "1")))[1]) == {"no number": 1}  # a code of texts, not a number


@pytest.mark.parametrize(
    ("item", "charted", "column"),
    [
        *((item, 33.0, "temperature") for item in (226329, 227632, 227634)),
        (227242, 40.0, "diastolic_bp"),
        *((item, 70.0, "mean_bp") for item in (228872, 229827)),
    ],
)
def test_items_that_measure_a_variable_are_read(item, charted, column):
    assert value(chart((item, 1, charted)), column)[1] == charted


@pytest.mark.parametrize("item", [224689, 224422, 224688, 224310, 220060, 227627, 226861, 229841, 220734, 226846])
def test_items_of_another_quantity_are_left_out(item):
    assert not run(chart((item, 1, 25)))[2][1].any()


def test_every_shipped_item_has_a_role_and_copies_name_their_laboratory_items():
    for c in CHANNELS:
        assert {*c.measured, *c.reported} == set(c.items) and not set(c.measured) & set(c.reported)
        assert set(c.copies) == {i for i in c.reported if i >= 220_000}
        assert all(i < 220_000 for labs_ in c.copies.values() for i in labs_)


def test_the_documented_items_are_those_of_the_file():
    text = (Path(__file__).parents[2] / "docs/features.md").read_text().partition("### Which items are in")[2]
    rows = [row.strip("| ").split(" | ") for row in text.partition("###")[0].splitlines() if row.startswith("| ")]
    documented: dict[str, tuple[set[int], ...]] = {}
    for names, *cells in rows[1:]:
        ids = [{int(i) for i in re.findall(r"\b[25][0-9]{4,5}\b", cell)} for cell in (*cells, "")]
        documented |= {name: (ids[0], ids[1]) for name in names.split(", ")}
    of = {c.name: set(c.items) for c in CHANNELS}
    for name, (taken, left) in documented.items():
        assert taken == (of[name] if not name.startswith("gcs") else set().union(*(of[n] for n in of if "gcs" in n)))
        assert not left & set().union(*of.values())
    assert set(documented) == set(of) - {"gcs_total"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("measured: [1, 2]", r"itemid \[2\] of measured, reported or copies is not among its items"),
        ("measured: [1], reported: [1]", r"\[1\] is both measured and reported"),
        ("copies: {1: [1]}", r"\[1\] has copies and is not in reported"),
    ],
)
def test_a_contradicting_role_is_refused(tmp_path, entry, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"channels:\n  - {{name: a, unit: u, range: [0, 1], normal: 0, items: {{1: as_is}}, {entry}}}\n")
    with pytest.raises(UserError, match=message):
        read_channels(path)


def test_a_laboratory_result_in_chartevents_needs_a_role():
    d_items = pd.DataFrame({"itemid": [225668, 220074], "label": "x", "category": ["Labs", "Hemodynamics"]})
    source = Source.from_frames({"d_items": d_items, "d_labitems": pd.DataFrame({"itemid": [50813]})})
    about = {"name": "a", "unit": "", "range": (0, 30), "normal": 1}
    declared = Channel(**about, items={225668: "as_is", 50813: "as_is", 220074: "as_is"})
    with pytest.raises(UserError, match=r"itemid \[225668\] is a laboratory result in chartevents"):
        check_items(source, (declared,), "default", Path("mine.yaml"))
    for role in ("measured", "reported"):
        check_items(source, (Channel(**about, items=declared.items, **{role: (225668,)}),), "default")


@pytest.mark.parametrize(("los", "step", "hours"), [(3, 1, []), (3, 2, [2]), (4, 2, []), (2.5, 1, [2]), (5, 3, [3])])
def test_a_value_at_outtime_is_in_the_last_bin_or_counted(los, step, hours):
    charted = chart((220045, los, 70), (220277, los, 97))
    _values, fates, observed = run(charted, labs((50931, 0, 150, los)), stay(los), step=step)
    assert (np.flatnonzero(observed[1].any(1)) * step).tolist() == hours
    assert fates_of(fates)["used" if hours else "at outtime"] and set(fates["n"]) == {1} and len(fates) == 3


def test_nothing_counts_from_after_death():
    stays = stay(6).assign(death_at=at(2))
    values, fates, _ = run(chart((220045, 1, 70), (220045, 2, 71), (220045, 2.1, 0.5), (220045, 4, 90)), stays=stays)
    assert values[1]["heart_rate"].tolist() == [86, 70, 71, 71, 71, 71]
    assert fates_of(fates) == {"used": 2, "after death": 1, "out of range": 1}


def test_laboratory_rows_without_hadm_id_inside_a_stay_count():
    assert value(None, "ph", labs((50820, 1, 7.2, 1.5, None)))[1] == 7.2


def test_urine_is_no_blood():
    assert value(None, "glucose", labs((51478, 1, 500, 1.5)))[2] == 128
    assert value(None, "ph", labs((51491, 1, 6.5, 1.5), (50831, 1, 6.4, 1.5), (51094, 1, 6.6, 1.5)))[2] == 7.4


@pytest.mark.parametrize(
    ("item", "charted", "column", "wanted"),
    [
        (223835, 50, "fio2", 0.5),
        (223835, 0.5, "fio2", 0.5),
        (223835, 1, "fio2", 1.0),
        (223835, 100, "fio2", 1.0),
        (226707, 70, "height", 177.8),
        (226730, 178, "height", 178),
        (223761, 98.6, "temperature", 37.0),
        (223762, 37, "temperature", 37.0),
        (223762, 98.6, "temperature", 37.0),
        (223761, 37, "temperature", 37.0),  # Celsius in the Fahrenheit item
        (226329, 98.6, "temperature", 37.0),
        (226531, 200, "weight", 90.7185),
        (226512, 90, "weight", 90),
    ],
)
def test_units_are_converted(item, charted, column, wanted):
    assert value(chart((item, 0.5, charted)), column)[0] == wanted


def test_out_of_range_values_are_dropped_and_counted():
    values, fates, observed = run(chart((220045, 0.5, 0), (220045, 0.6, 900), (224639, 0.5, 0), (223835, 0.5, 0)))
    assert values[1].iloc[0][["heart_rate", "weight", "fio2"]].tolist() == pytest.approx([86, 81, 0.21])
    assert fates.set_index("fate")["n"].to_dict().keys() == {"out of range"} and fates["n"].sum() == 4
    assert not observed[1].any()


def test_capillary_refill_is_read_from_its_text():
    texts = ["Normal <3 Seconds", "Abnormal >3 Seconds", "Brisk", "Delayed", "Normal <3 secs", "Abnormal >3 secs"]
    items = [223951, 224308] * 3
    events = chart(*((item, h + 0.5, None, text) for h, (item, text) in enumerate(zip(items, texts, strict=True))))
    values, fates, _ = run(events)
    assert values[1]["capillary_refill"].tolist() == [0, 1, 0, 1, 0, 1]
    _, fates, _ = run(chart((223951, 0.5, None, "Other/Remarks")))
    assert fates["fate"].tolist() == ["no number"]


def test_gcs_total_only_where_the_three_parts_share_a_charttime():
    eye, verbal, motor = 220739, 223900, 223901
    together = [(eye, 1, 4, "Spontaneously"), (verbal, 1, 5, "Oriented"), (motor, 1, 5, "Localizes Pain")]
    apart = [(eye, 2, 1, "None"), (verbal, 2.1, 2, "Incomprehensible sounds"), (motor, 2, 1, "No response")]
    values, _fates, observed = run(chart(*together, *apart))
    assert values[1]["gcs_total"].tolist() == [15, 14, 14, 14, 14, 14]
    assert observed[1][:, NAMES.index("gcs_total")].tolist() == [0, 1, 0, 0, 0, 0]
    assert values[1]["gcs_eye"].tolist() == [4, 4, 1, 1, 1, 1]


def test_no_response_ett_is_marked_as_intubated():
    events = chart((223900, 1, 1, "No Response-ETT"), (223900, 3, 1, "No Response"))
    assert value(events, "gcs_intubated") == [0, 1, 1, 0, 0, 0]
    assert value(events, "gcs_verbal") == [5, 1, 1, 1, 1, 1]


def test_two_hour_steps():
    events = chart((220045, 0.5, 60), (220045, 1.9, 61), (220045, 2.0, 62))
    assert value(events, "heart_rate", step=2, stays=stay(5.0)) == [61, 62, 62]


def test_length_is_the_stay_rounded_up():
    assert bins.lengths(np.array([48.0, 48.0003, 0.01, 47.9999]), 1).tolist() == [48, 49, 1, 48]
    assert bins.lengths(np.array([48.0, 49.0]), 2).tolist() == [24, 25]


def test_a_user_adds_a_variable_by_an_entry(tmp_path):
    path = tmp_path / "mine.yaml"
    entry = "\n  - {name: lactate, unit: mmol/L, range: [0.1, 30], normal: 1.5, items: {50813: as_is}}\n"
    shipped = SHIPPED.read_text()
    path.write_text(shipped + entry)
    channels = read_channels(path)
    values, _fates, observed = run(None, labs((50813, 1, 4.2, 1.5)), channels=channels)
    assert values[1]["lactate"].astype(float).round(4).tolist() == [1.5, 4.2, 4.2, 4.2, 4.2, 4.2]
    assert observed[1].shape == (6, 18)


def test_an_unknown_itemid_and_a_bad_entry_are_named(tmp_path):
    items = {"d_items": pd.DataFrame({"itemid": [220045]}), "d_labitems": pd.DataFrame({"itemid": [50931]})}
    wrong = Channel(name="lactate", unit="", range=(0, 1), normal=0, items={999999: "as_is"})
    with pytest.raises(UserError, match=r"itemid \[999999\] of lactate is in neither"):
        check_items(Source.from_frames(items), (wrong,), "default", Path("mine.yaml"))
    assert 223835 in check_items(Source.from_frames(items), CHANNELS, "default")
    path = tmp_path / "bad.yaml"
    path.write_text("channels:\n  - {name: a, unit: u, range: [0, 1], normal: 0, items: {1: feet}, colour: red}\n")
    with pytest.raises(UserError) as caught:
        read_channels(path)
    assert "as_is, inches" in str(caught.value) and "colour" in str(caught.value)


def test_medfuse_divides_every_fio2_and_leaves_inches():
    got = run(chart((223835, 0.5, 0.5), (223835, 1.5, 50), (226707, 0.5, 70)), preset=medfuse)[0][1]
    assert got["Fraction inspired oxygen"].astype(float).round(4).tolist()[:2] == [0.005, 0.5]
    assert got["Height"].tolist()[0] == 70


def test_medfuse_bins_are_closed_on_the_right_and_ties_compare_as_text():
    got = run(chart((220045, 1.0, 108), (220045, 1.0, 87), (220045, 2.5, 60)), preset=medfuse)[0][1]
    assert got["Heart Rate"].tolist() == [87, 87, 60, 60, 60, 60]


def test_medfuse_loses_laboratory_rows_without_hadm_id_and_mixes_urine_in():
    lost = run(None, labs((50931, 1.5, 300, 1.6, None)), preset=medfuse)[0][1]
    mixed = run(None, labs((51478, 1.5, 300, 9)), preset=medfuse)[0][1]
    assert lost["Glucose"].tolist() == [128] * 6
    assert mixed["Glucose"].tolist() == [128, 300, 300, 300, 300, 300]


def known(event: Any, lab_events: pd.DataFrame) -> tuple[Any, ...]:
    """When an event was known (None: never), its storetime, item, number."""
    time, stored = event.charttime, event.storetime
    if event.itemid in (220621, 50931):  # reported
        if pd.isna(stored) and event.itemid == 220621:
            same = lab_events[(lab_events.charttime == time) & (lab_events.valuenum == event.valuenum)]
            stored = same.storetime.clip(lower=time).min()
        time = None if pd.isna(stored) else max(time, stored)
        stored = time if pd.isna(event.storetime) else event.storetime
    return time, stored, event.itemid, event.valuenum


def naive(
    events: pd.DataFrame, lab_events: pd.DataFrame, stays: pd.DataFrame, step: int
) -> dict[tuple[int, str, int], float]:
    """(stay, variable, bin) -> the last value, by loops over rows."""
    channel_of = {item: c for c in CHANNELS for item in c.items}
    out: dict[tuple[int, str, int], tuple[Any, ...]] = {}
    for row in stays.itertuples():
        mine = [known(e, lab_events) for e in events[events.stay_id == row.stay_id].itertuples()]
        for time, stored, item, number in mine + [known(e, lab_events) for e in lab_events.itertuples()]:
            channel = channel_of[item]
            if (
                time is None
                or not row.intime <= time <= row.outtime
                or not channel.range[0] <= number <= channel.range[1]
            ):
                continue
            seconds = int((time - row.intime).total_seconds())
            if (key := (row.stay_id, channel.name, seconds // (3600 * step)))[2] >= math.ceil(row.los_hours / step):
                continue
            rank = (time, pd.Timestamp.min if pd.isna(stored) else stored, number)
            out[key] = max(out.get(key, rank), rank)
    return {key: rank[-1] for key, rank in out.items()}


minutes = st.integers(-90, 500)
numbers = st.sampled_from([0, 50, 80, 81, 120, 999])
stored = st.none() | st.integers(-60, 600)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([220045, 220621]), minutes, numbers, stored, st.sampled_from([1, 2])), max_size=12
    ),
    st.lists(st.tuples(minutes, numbers, stored), max_size=6),
    st.sampled_from([1, 2]),
)
def test_series_equal_a_naive_version(chart_rows, lab_rows, step):
    parts = [chart((item, m / 60, v, None, None if s is None else s / 60), stay=k) for item, m, v, s, k in chart_rows]
    events = pd.concat(parts, ignore_index=True) if parts else chart()
    lab_events = labs(*((50931, m / 60, v, None if s is None else s / 60) for m, v, s in lab_rows))
    stays = pd.concat([stay(3.2), stay(2.5, 2, 4.0)], ignore_index=True)
    values, fates, observed = run(events, lab_events, stays, step)
    assert fates.loc[fates["fate"] == "used", "n"].sum() == sum(cells.sum() for cells in observed.values())
    assert fates["n"].sum() >= len(events)  # a laboratory row may meet both stays, or none
    wanted = naive(events, lab_events, stays, step)
    for stay_id in (1, 2):
        for name in ("heart_rate", "glucose"):
            seen = observed[stay_id][:, NAMES.index(name)]
            bins = {b: v for (s, n, b), v in wanted.items() if s == stay_id and n == name}
            assert np.flatnonzero(seen).tolist() == sorted(bins)
            now = 86 if name == "heart_rate" else 128
            for b in range(len(seen)):
                now = bins.get(b, now)
                assert values[stay_id][name][b] == now


def test_load_normalises_by_the_train_stays_observed_values_only(tmp_path):
    columns = bins.layout(CHANNELS)
    heart = columns.values.index("heart_rate")
    rows = {"stay_id": [1, 1, 2, 2, 3], "channel": [NAMES.index("heart_rate")] * 5, "bin": [0, 2, 0, 1, 1]}
    rows |= {"v": [60.0, 80.0, 100.0, 120.0, 1000.0], "mark": [0.0] * 5, "n": [1] * 5, "unstored": [0] * 5}
    batch = hold(Source.from_frames({}).con, "rows", pa.table(rows)).to_pyarrow().to_batches()
    path = tmp_path / "series.safetensors"
    series_file.write(path, batch, np.array([1, 2, 3]), np.array([4, 2, 3]), columns, chunk=2)
    fitted = series.fit(path, columns, np.array([True, True, False]), chunk=2)
    assert fitted["mean"][heart] == 90 and fitted["std"][heart] == pytest.approx(np.std([60, 80, 100, 120]))
    assert fitted["mean"][columns.values.index("glucose")] is None  # nothing observed: left as it is
    assert fitted["mean"][columns.values.index("gcs_intubated")] is None
    write_json(tmp_path / "series.json", {"step_hours": 1, "normaliser": fitted})
    raw, scaled = series.load(tmp_path, normalise=False), series.load(tmp_path, [3, 1], hours=2)
    assert {i: a.shape for i, a in raw.items()} == {1: (4, 35), 2: (2, 35), 3: (3, 35)}
    assert raw[1][:, heart].tolist() == [60, 60, 80, 80] and raw[3][:, heart].tolist() == [86, 1000, 1000]
    assert list(scaled) == [3, 1] and scaled[1].shape == (2, 35) and scaled[1].dtype == np.float32
    assert scaled[1][0, heart] == pytest.approx((60 - 90) / fitted["std"][heart])
    assert raw[1][:, 18 + NAMES.index("heart_rate")].tolist() == [1, 0, 1, 0]
    with pytest.raises(UserError, match="1 stays have no series"):
        series.load(tmp_path, [1, 99])


def test_default_columns_are_seventeen_variables_and_a_mark():
    columns = bins.layout(CHANNELS)
    assert len(columns.values) == 18 and len(columns.observed) == 17
    assert len(medfuse.layout(CHANNELS).values) == 59 and len(medfuse.layout(CHANNELS).observed) == 17
