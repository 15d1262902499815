"""Event tables that do not describe the cohort cause an error or a warning, not series of normal values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from configs import UserError
from ehr_features.audit import audit
from ehr_features.audit.events import COVERED
from ehr_features.audit.verdict import PROVED, REFUTED
from ehr_features.build import build
from ehr_features.check import check
from ehr_features.series.coverage import NO_STAY, bare, rare

Frames = dict[str, pd.DataFrame]
VITALS = (220045, 220179, 220210)


def other_release(chart: pd.DataFrame) -> pd.DataFrame:
    return chart.assign(stay_id=chart["stay_id"] + 5_000_000)


def other_items(chart: pd.DataFrame) -> pd.DataFrame:
    return chart.assign(itemid=224_000)


def no_values(chart: pd.DataFrame) -> pd.DataFrame:
    return chart.assign(valuenum=np.nan, value=None)


def no_stays(chart: pd.DataFrame) -> pd.DataFrame:
    return chart.assign(stay_id=None)


def no_ids(chart: pd.DataFrame) -> pd.DataFrame:
    return chart.assign(itemid=chart["itemid"].astype(str) + ".5")


SILENT = {
    "other_release": (other_release, NO_STAY[1]),
    "no_stays": (no_stays, NO_STAY[0]),
    "other_items": (other_items, "there are none"),
    "no_values": (no_values, "no number"),
    "no_ids": (no_ids, "there are none"),
}


@pytest.fixture
def vitals(frames: Frames) -> Frames:
    """Chart events of three vital signs alone, without laboratory values."""
    rate = frames["chartevents"].query("itemid == 220045")
    frames["chartevents"] = pd.concat([rate.assign(itemid=item) for item in VITALS], ignore_index=True)
    frames["d_items"] = pd.DataFrame({"itemid": [*VITALS, 224_000], "label": "x"})
    return frames


@pytest.mark.parametrize("kind", SILENT)
@pytest.mark.parametrize("labs", [True, False])
def test_a_silent_event_table_is_refused(
    tmp_path: Path,
    vitals: Frames,
    write: Callable,
    config: Callable,
    capsys: pytest.CaptureFixture,
    kind: str,
    labs: bool,
) -> None:
    change, fate = SILENT[kind]
    vitals["chartevents"] = change(vitals["chartevents"])
    vitals["labevents"] = vitals["labevents"] if labs else vitals["labevents"][:0]
    write(tmp_path / "mimic", vitals)
    assert check(config()) == 2
    assert "fault: chartevents: 8 of 8 stays have no value of the charted variables" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"8 of 8 stays \(100%\) have nothing observed of chartevents.*valuenum"
    ) as told:
        build(config())
    assert fate in str(told.value) and not (tmp_path / "features").exists()


@pytest.mark.parametrize("change", [other_release, no_stays, other_items, no_values])
def test_the_first_rows_of_a_large_silent_table_are_enough_for_check(
    tmp_path: Path, vitals: Frames, write: Callable, config: Callable, monkeypatch: pytest.MonkeyPatch, change: Callable
) -> None:
    monkeypatch.setattr("ehr_features.series.coverage.SAMPLED", 50)
    write(tmp_path / "mimic", vitals)
    assert check(config()) == 0
    write(tmp_path / "mimic", vitals | {"chartevents": change(vitals["chartevents"])})
    assert check(config()) == 2


@pytest.mark.parametrize("preset", ["default", "medfuse"])
def test_events_without_a_stay_are_counted_by_what_they_lack(
    tmp_path: Path, vitals: Frames, write: Callable, config: Callable, capsys: pytest.CaptureFixture, preset: str
) -> None:
    chart = vitals["chartevents"].astype({"stay_id": "Int64"})
    chart.loc[chart.index % 2 == 0, "stay_id"] = None
    chart.loc[chart.index % 10 == 1, "stay_id"] = 39_999_999
    vitals["chartevents"] = chart
    vitals["patients"].loc[0, "anchor_age"] = 12  # one stay is of a child
    vitals["labevents"] = vitals["labevents"][:0]
    write(tmp_path / "mimic", vitals)
    out = build(config(preset=preset))
    events = pd.DataFrame(json.loads((out / "series.json").read_text())["events"])
    counts = events.groupby("fate")["n"].sum()
    child = chart["stay_id"].eq(30_000_001).sum()
    wanted = [chart["stay_id"].isna().sum(), chart["stay_id"].eq(39_999_999).sum(), child]
    counted = counts.reindex(NO_STAY).fillna(0).tolist()
    assert counted == (wanted if preset == "default" else [0, *wanted[1:]])
    assert preset == "medfuse" or events["n"].sum() == len(chart)
    said = json.loads((out / "provenance.json").read_text())["warnings"]
    assert any("events of the charted variables have no stay" in w for w in said)
    told = {v.claim: v for v in audit(out, [])}[COVERED]
    assert told.outcome == REFUTED and f"{sum(wanted[:2]):,} charted values without a stay" in told.counts
    capsys.readouterr()
    assert check(config(preset=preset)) == 0
    assert "events of the variables have no stay of icustays" in capsys.readouterr().out


def test_a_whole_table_is_no_warning_and_the_demos_shares_are_declared(
    tmp_path: Path, frames: Frames, write: Callable, config: Callable
) -> None:
    write(tmp_path / "mimic", frames)
    out = build(config())
    said = json.loads((out / "provenance.json").read_text())["warnings"]
    told = {w.split(" is observed")[0] for w in said if " is observed" in w}
    claim = {v.claim: v for v in audit(out, [])}[COVERED]
    assert claim.outcome == PROVED and "in far fewer stays than in the MIMIC-IV demo: " in claim.counts
    assert all(f"{name} 0%" in claim.counts for name in told)
    assert told and not told & {"heart_rate", "gcs_eye", "gcs_verbal", "gcs_motor", "gcs_total", "glucose"}


def test_a_stay_is_bare_without_what_chartevents_can_hold() -> None:
    seen = np.array([[0, 1], [1, 0], [0, 0]], dtype=bool)
    rate, both, lab = ("rate", 1.0, (220045,)), ("glucose", 1.0, (220621, 50931)), ("lactate", None, (50813,))
    assert bare(seen, [rate, both]).tolist() == [False, False, True]
    assert bare(seen, [rate, lab]).tolist() == [True, False, True]
    assert bare(seen, [lab, lab]).tolist() == [False, False, True]


@pytest.mark.parametrize("item", [220621, 220277, 223835])  # also of labevents; also of labevents; in half of the stays
def test_one_charted_variable_is_enough(
    tmp_path: Path, frames: Frames, write: Callable, config: Callable, item: int
) -> None:
    rate = frames["chartevents"].query("itemid == 220045")
    frames["chartevents"] = rate.assign(itemid=item, value="90", valuenum=90.0)
    frames["d_items"] = pd.DataFrame({"itemid": [item], "label": "x"})
    write(tmp_path / "mimic", frames)
    assert check(config()) == 0
    assert {v.claim: v for v in audit(build(config()), [])}[COVERED].outcome == PROVED


@pytest.mark.parametrize(
    ("ours", "share", "stays", "told"),
    [
        (0, 1, 1, False),
        (0, 1, 2, True),
        (0, 0.5, 9, False),
        (0, 0.5, 10, True),
        (0.59, 1, 100, True),
        (0.61, 1, 100, False),
    ],
)
def test_rare_is_what_chance_does_not_explain(ours: float, share: float, stays: int, told: bool) -> None:
    seen = np.arange(stays)[:, None] < ours * stays
    assert bool(rare(seen, [("a", share, ())])) is told and not rare(seen, [("a", None, ())])
