"""The items of the series: units, specimens, texts; the valid contents of channels.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from configs import UserError
from ehr_features.raw.source import Source
from ehr_features.series.channels import SHIPPED, Channel, check_items, read_channels
from tests.ehr_features.one_stay import (
    CHANNELS,
    NAMES,
    arterial,
    chart,
    fates_of,
    labs,
    run,
    value,
)


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
