"""Hourly series from events: bins, order, when a value is known, the published layout, loading."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from ehr_features import series
from ehr_features.files import write_json
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source
from ehr_features.series import bins, medfuse
from ehr_features.series import file as series_file
from tests.ehr_features.one_stay import (
    CHANNELS,
    NAMES,
    arterial,
    at,
    chart,
    fates_of,
    labs,
    run,
    stay,
    value,
)
from tests.written import series_json


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


def test_two_hour_steps():
    events = chart((220045, 0.5, 60), (220045, 1.9, 61), (220045, 2.0, 62))
    assert value(events, "heart_rate", step=2, stays=stay(5.0)) == [61, 62, 62]


def test_length_is_the_stay_rounded_up():
    assert bins.lengths(np.array([48.0, 48.0003, 0.01, 47.9999]), 1).tolist() == [48, 49, 1, 48]
    assert bins.lengths(np.array([48.0, 49.0]), 2).tolist() == [24, 25]


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


charted = st.tuples(st.sampled_from([220045, 220621]), minutes, numbers, stored, st.sampled_from([1, 2]))
persons = st.tuples(st.lists(charted, max_size=12), st.lists(st.tuples(minutes, numbers, stored), max_size=6))


@settings(max_examples=6, deadline=None)
@given(st.lists(persons, min_size=5, max_size=5), st.sampled_from([1, 2]))
def test_series_equal_a_naive_version(people, step):
    tables = []  # events, laboratory events and the two stays of each person
    for n, (chart_rows, lab_rows) in enumerate(people):
        rows = [(item, m / 60, v, None, None if s is None else s / 60) for item, m, v, s, _ in chart_rows]
        parts = [chart(row, stay=2 * n + k) for row, (*_, k) in zip(rows, chart_rows, strict=True)]
        events = pd.concat(parts, ignore_index=True) if parts else chart()
        lab_events = labs(*((50931, m / 60, v, None if s is None else s / 60) for m, v, s in lab_rows))
        stays = pd.concat([stay(3.2, 2 * n + 1), stay(2.5, 2 * n + 2, 4.0)], ignore_index=True)
        tables.append([table.assign(subject_id=7 + n, hadm_id=500 + n) for table in (events, lab_events, stays)])
    values, fates, observed = run(*(pd.concat(same, ignore_index=True) for same in zip(*tables, strict=True)), step)
    assert fates.loc[fates["fate"] == "used", "n"].sum() == sum(cells.sum() for cells in observed.values())
    assert fates["n"].sum() >= sum(len(events) for events, *_ in tables)  # laboratory rows may meet both stays, or none
    wanted = {key: value for own in tables for key, value in naive(*own, step).items()}
    for stay_id in range(1, 2 * len(people) + 1):
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
    observed = [name.removeprefix("mask->") for name in columns.observed]
    write_json(tmp_path / "series.json", series_json(list(columns.values), observed, normaliser=fitted))
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
