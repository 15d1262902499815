"""The audit proves a clean folder and refutes each planted leak."""

import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from configs import UserError
from ehr_features import audit, series
from ehr_features.__main__ import main, parser
from ehr_features.audit.films import RECORD, STAYS
from ehr_features.audit.runs import check_runs
from ehr_features.audit.verdict import PROVED, REFUTED, UNKNOWN
from ehr_features.build import build
from ehr_features.config import FeaturesConfig
from ehr_features.demo import generate as demo
from ehr_features.files import write_json
from ehr_features.raw import source
from ehr_features.series import bins, channels
from ehr_features.typed import read_json


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small raw MIMIC, and the features/ built from it."""
    root = tmp_path_factory.mktemp("audit")
    demo.generate(root / "raw", subjects=60, seed=3, film_size=32)
    raw = {f"mimic_{name}": str(root / "raw" / folder) for name, folder in (("iv", "mimic-iv"), ("cxr", "mimic-cxr"))}
    tasks = ("mortality", "phenotypes", "decompensation", "length_of_stay")
    config = FeaturesConfig(**raw, mimic_ed=str(root / "raw" / "mimic-iv-ed"), out=root / "features", tasks=tasks)
    return build(config)


@pytest.fixture
def features(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "features"))


def outcomes(features: Path) -> dict[str, str]:
    return {v.claim: v.outcome for v in audit.audit(features, [])}


def of_run(features: Path, run: Path, what: str) -> str:
    """The outcome of a claim on a run; the claims on the features are not checked again."""
    found = {v.claim: v.outcome for v in check_runs([run], pd.read_parquet(features / "images.parquet"))}
    return of(found, what)


def change(table: str, edit: Callable[[pd.DataFrame], None]) -> Callable[[Path], None]:
    def leak(folder: Path) -> None:
        frame = pd.read_parquet(folder / f"{table}.parquet")
        edit(frame)
        frame.to_parquet(folder / f"{table}.parquet")

    return leak


def change_json(name: str, edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def leak(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        edit(value)
        (folder / name).write_text(json.dumps(value))

    return leak


def change_series(edit: Callable[[Path, dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def leak(folder: Path) -> None:
        arrays = {name: array.copy() for name, array in load_file(folder / "series.safetensors").items()}
        edit(folder, arrays)
        save_file(arrays, folder / "series.safetensors")

    return leak


# --- leaks -----------------------------------------------------------------------------------------------------------


def _films_of_a_test_subject_in_train(images: pd.DataFrame) -> None:
    both = images["split"].eq("test") & images["stay_id"].notna()
    images.loc[images["subject_id"] == images.loc[both, "subject_id"].iloc[0], "split"] = "train"


def _hours_later(samples: pd.DataFrame) -> None:
    samples.loc[samples["decompensation"] == 1, "predict_at_hours"] += 24


def _later_film(folder: Path) -> None:
    samples, films = (pd.read_parquet(folder / f"{t}.parquet") for t in ("samples/mortality", "stay_films"))
    late = films.merge(samples[["stay_id", "predict_at_hours"]], on="stay_id")
    late = late[late["hours_from_intime"] > late["predict_at_hours"]].iloc[0]
    samples.loc[samples["stay_id"] == late["stay_id"], "dicom_id"] = late["dicom_id"]
    samples.to_parquet(folder / "samples" / "mortality.parquet")


def _film_of_another(samples: pd.DataFrame) -> None:
    paired = samples.index[samples["dicom_id"].notna()]
    samples.loc[paired[0], "dicom_id"] = samples.loc[paired[1], "dicom_id"]


def _films_ten_hours_early(stay_films: pd.DataFrame) -> None:
    stay_films["hours_from_intime"] -= 10


def _filled_backwards(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    layout = bins.layout(channels.read_channels())
    for begin, end in zip(arrays["offsets"], arrays["offsets"][1:], strict=False):
        for column, channel in enumerate(layout.source):
            seen = np.flatnonzero(arrays["observed"][begin:end, channel])
            values = arrays["values"][begin:end, column]
            if len(seen) and values[seen[0]] != values[0]:
                values[: seen[0]] = values[seen[0]]
                return
    raise AssertionError("no first value differs from the normal one")


def _an_hour_early(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    for begin, end in zip(arrays["offsets"], arrays["offsets"][1:], strict=False):
        for name in ("values", "observed"):
            arrays[name][begin : end - 1] = arrays[name][begin + 1 : end]


def _placed(table: str, item: int, when: str, kind: str | None = None) -> Callable[[Path], None]:
    """Put a value of an item into an unobserved hour, at its charttime or storetime."""

    def place(folder: Path, arrays: dict[str, np.ndarray]) -> None:
        root = Path(FeaturesConfig(**json.loads((folder / "provenance.json").read_text())["config"]).mimic_iv)
        rows = pd.read_csv(root / f"{table}.csv.gz", parse_dates=["charttime", "storetime"], low_memory=False)
        if kind:
            rows = rows[rows["specimen_id"].isin(rows.loc[rows["value"] == kind, "specimen_id"])]
        rows = rows[(rows["itemid"] == item) & rows["valuenum"].notna()].drop(columns="stay_id", errors="ignore")
        rows = rows.merge(pd.read_parquet(folder / "stays.parquet"), on="subject_id")
        at, stored = ((rows[t] - rows["intime"]).dt.total_seconds() // 3600 for t in (when, "storetime"))
        declared = channels.read_channels()
        channel = next(n for n, c in enumerate(declared) if item in c.items)
        column = bins.layout(declared).values.index(declared[channel].name)
        for row in rows.assign(at=at)[(at >= 0) & (bool(kind) | (stored > at))].itertuples():
            begin, end = arrays["offsets"][np.searchsorted(arrays["stay_id"], row.stay_id) :][:2]
            cell = begin + int(row.at)
            if cell < end and (kind or not arrays["observed"][cell, channel]):
                arrays["observed"][cell, channel], arrays["values"][cell, column] = 1, row.valuenum
                return
        raise AssertionError("no value of the item can be placed")

    return change_series(place)


def _forgotten(names: Sequence[str], share: float) -> Callable[[Path, dict[str, np.ndarray]], None]:
    """Remove variables (all if none is named) from a share of the stays, as if filled with normal values."""

    def leak(folder: Path, arrays: dict[str, np.ndarray]) -> None:
        about = json.loads((folder / "series.json").read_text())
        masks = [c.removeprefix("mask->") for c in about["columns"][about["num_values"] :]]
        rows = slice(0, int(arrays["offsets"][int(share * len(arrays["stay_id"]))]))
        gone = [n for n, name in enumerate(masks) if name in names or not names]
        columns = [f for f, of in enumerate(about["observed_of"]) if of in gone]
        arrays["observed"][rows, gone] = 0
        arrays["values"][rows, columns] = np.array(about["imputation"]["normal"], np.float32)[columns]

    return leak


def _label_in_the_series(about: dict[str, Any]) -> None:
    about["columns"][3] = "mortality"


def _outcome_said_to_be_known(tables: dict[str, Any]) -> None:
    tables["images"]["died_in_hospital"]["available_at"] = "study"


def _fitted_on_all(folder: Path) -> None:
    stays = pd.read_parquet(folder / "stays.parquet")
    layout = bins.layout(channels.read_channels())
    fitted = series.fit(folder / "series.safetensors", layout, np.ones(len(stays), bool))
    change_json("series.json", lambda about: about["normaliser"].update(fitted))(folder)


def _triage_before_arrival(images: pd.DataFrame) -> None:
    images.loc[images.index[images["ed_acuity"].notna()][0], "hours_since_ed_arrival"] = -2.0


def _studies_that_come_later(images: pd.DataFrame) -> None:
    images.loc[0, "num_prior_studies"] += 1


def _mortality_at_three_days(samples: pd.DataFrame) -> None:
    samples["predict_at_hours"] = 72.0


def _films_two_days_early(folder: Path) -> None:
    images, films = (pd.read_parquet(folder / f"{t}.parquet") for t in ("images", "stay_films"))
    late = films[films["hours_from_intime"] > 50].iloc[0]
    images.loc[images["dicom_id"] == late["dicom_id"], "taken_at"] -= pd.Timedelta(hours=48)
    films.loc[films["dicom_id"] == late["dicom_id"], "hours_from_intime"] -= 48
    images.to_parquet(folder / "images.parquet")
    films.to_parquet(folder / "stay_films.parquet")


def _stays_an_hour_late(stays: pd.DataFrame) -> None:
    stays["intime"] += pd.Timedelta(hours=1)


def _own_diagnoses(images: pd.DataFrame) -> None:
    images.loc[images.index[images["num_prior_admissions"] == 0][0], "prior_phenotypes"] = "108 131"


def _admission_that_has_not_ended(images: pd.DataFrame) -> None:
    images.loc[images["num_prior_admissions"].notna(), "num_prior_admissions"] += 1


def _stay_that_is_to_come(folder: Path) -> None:
    images, stays = (pd.read_parquet(folder / f"{t}.parquet") for t in ("images", "stays"))
    outside = images[images["stay_id"].isna()].merge(stays, on="subject_id", suffixes=("", "_of"))
    early = outside[outside["taken_at"] < outside["intime"]].iloc[0]
    images.loc[images["dicom_id"] == early["dicom_id"], ["stay_id", "in_icu"]] = [early["stay_id_of"], 1]
    images.to_parquet(folder / "images.parquet")


def _film_after_its_stay(stay_films: pd.DataFrame) -> None:
    stay_films.loc[0, "hours_from_intime"] = 5000.0


def _another_column(about: dict[str, Any]) -> None:
    about["columns"][5] = "hours_until_discharge"


def _triage_of_a_visit_to_come(images: pd.DataFrame) -> None:
    images.loc[images.index[images["ed_acuity"].isna()][0], ["hours_since_ed_arrival", "ed_acuity"]] = [1.0, 2.0]


def _outcome_written_as_position(images: pd.DataFrame) -> None:
    images["position"] = images["died_in_hospital"].map({1: "Erect", 0: "Recumbent"})


def _outcome_written_as_age(stays: pd.DataFrame) -> None:
    stays["age_years"] += (stays["los_hours"] > 72).astype(int)


def _one_column_more(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    arrays["values"] = np.pad(arrays["values"], ((0, 0), (0, 1)))


def _finding_called_sex(tables: dict[str, Any]) -> None:
    tables["images"]["Pneumonia"]["group"] = "sex"


def test_preset_medfuse_is_judged_by_its_own_rule_of_times(clean: Path, tmp_path: Path) -> None:
    built_with = json.loads((clean / "provenance.json").read_text())["config"]
    keys = {"preset": "medfuse", "out": tmp_path / "features", "tasks": ("mortality",)}
    folder = build(FeaturesConfig(**built_with | keys))
    told = {v.claim: v for v in audit.audit(folder, [])}
    assert {v.outcome for v in told.values()} == {PROVED}
    assert re.search(
        r"from their draw, as published: [1-9]\d* from before their report", told[audit.series.KNOWN].counts
    )
    change_series(_an_hour_early)(folder)
    assert outcomes(folder)[audit.series.KNOWN] == REFUTED


LEAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "films of a test subject in train": (change("images", _films_of_a_test_subject_in_train), "no subject is in two"),
    "samples of a subject in another split": (
        change("samples/mortality", lambda t: t.update({"split": t["split"].map({"train": "test"}).fillna("train")})),
        "no subject is in two splits",
    ),
    "a film from after the prediction": (_later_film, "no film is from after"),
    "a film of another subject": (change("samples/mortality", _film_of_another), "no film is from after"),
    "films moved to an earlier hour": (
        change("stay_films", _films_ten_hours_early),
        "films of stays have the hour",
    ),
    "values filled backwards": (change_series(_filled_backwards), "never back"),
    "series an hour early": (change_series(_an_hour_early), "no vital sign or laboratory value"),
    "a laboratory value at its draw": (_placed("hosp/labevents", 50931, "charttime"), audit.series.KNOWN),
    "a glucose copied into the chart at its draw": (
        _placed("icu/chartevents", 220621, "charttime"),
        audit.series.KNOWN,
    ),
    "a pH copied into the chart at its draw": (_placed("icu/chartevents", 223830, "charttime"), audit.series.KNOWN),
    "a venous saturation": (_placed("hosp/labevents", 50817, "storetime", "VEN."), audit.series.KNOWN),
    "hours that remain after death": (
        change("samples/length_of_stay", lambda t: t.update({"los_remaining_hours": t["los_remaining_hours"] + 1})),
        audit.claims.ENDS,
    ),
    "a sample from after death": (change("samples/decompensation", _hours_later), audit.claims.ENDS),
    "series of normal values": (change_series(_forgotten([], 1)), audit.events.COVERED),
    "half the stays without a value": (change_series(_forgotten([], 0.5)), audit.events.COVERED),
    "a variable that was not read": (change_series(_forgotten(["heart_rate"], 1)), audit.events.COVERED),
    "a text variable lost in some stays": (change_series(_forgotten(["gcs_eye"], 0.1)), audit.events.COVERED),
    "a label in the series": (change_json("series.json", _label_in_the_series), "no finding, phenotype or outcome"),
    "an outcome said to be known": (change_json("schema.json", _outcome_said_to_be_known), "no finding, phenotype or"),
    "a normaliser fitted on all": (_fitted_on_all, "the normaliser is fitted on train only"),
    "triage of a visit to come": (change("images", _triage_before_arrival), "triage, arrivals and earlier studies"),
    "a prediction moved to a later hour": (
        change("samples/mortality", _mortality_at_three_days),
        "at the hour of its task",
    ),
    "films moved to an earlier day": (_films_two_days_early, RECORD),
    "stays that begin later": (change("stays", _stays_an_hour_late), STAYS),
    "diagnoses of this admission": (change("images", _own_diagnoses), RECORD),
    "an admission that goes on": (change("images", _admission_that_has_not_ended), RECORD),
    "a stay that is to come": (_stay_that_is_to_come, "triage, arrivals and earlier studies"),
    "a film from after its stay": (change("stay_films", _film_after_its_stay), "films of stays have the hour"),
    "a column that nobody declared": (change_json("series.json", _another_column), "the declared variables only"),
    "triage of a visit to come, its hours hidden": (change("images", _triage_of_a_visit_to_come), RECORD),
    "an outcome in another column of films": (change("images", _outcome_written_as_position), RECORD),
    "an outcome in another column of stays": (change("stays", _outcome_written_as_age), STAYS),
    "an ICU stay that nobody had": (change("images", lambda t: t.update({"in_icu": t["in_icu"].fillna(1)})), RECORD),
    "a label that no schema declares": (
        change("images", lambda t: t.insert(3, "mortality", 1)),
        "no finding, phenotype or outcome",
    ),
    "a finding called sex": (change_json("schema.json", _finding_called_sex), "no finding, phenotype or outcome"),
    "studies that come later": (change("images", _studies_that_come_later), "triage, arrivals and earlier studies"),
}


def test_clean_folder_is_proved(features: Path) -> None:
    assert set(outcomes(features).values()) == {PROVED}


@pytest.mark.parametrize("own", [{"subject_id": ["x"]}, {"stay_id": [1], "sepsis": [0]}, None])
def test_a_users_own_samples_are_named_and_not_refuted(features: Path, own: dict[str, Any] | None) -> None:
    table = (
        pd.read_parquet(features / "samples/mortality.parquet").assign(sepsis=1) if own is None else pd.DataFrame(own)
    )
    table.to_parquet(features / "samples/mine.parquet")
    said = audit.audit(features, [])
    assert {v.outcome for v in said} == {PROVED}
    assert any(f"samples/mine.{table.columns[-1]}" in v.counts for v in said)


def test_folder_without_films_is_proved(features: Path) -> None:
    for name in ("images", "stay_films"):
        (features / f"{name}.parquet").unlink()
    for path in (features / "samples").glob("*.parquet"):
        pd.read_parquet(path).assign(dicom_id=pd.NA).to_parquet(path)
    assert set(outcomes(features).values()) == {PROVED}


def test_samples_and_films_are_queried_where_they_lie_within_one_limit(
    features: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    only(audit.series.KNOWN, audit.events.COVERED, audit.films.RECORD)
    monkeypatch.setattr(pd, "read_parquet", lambda *_, **__: pytest.fail("a table was loaded"))
    monkeypatch.setattr(series.Mapped, "read", lambda *_: pytest.fail("the series was loaded"))
    limits: list[str] = []
    for module in (audit.written, source):
        limited = functools.partial(_noted, limits, module.connect)
        monkeypatch.setattr(module, "connect", limited)
    assert {v.outcome for v in audit.audit(features, [], memory="700MB")} == {PROVED}
    assert limits == ["700MB", "700MB"]


def test_features_built_with_a_limit_that_is_refused_now_are_audited(features: Path) -> None:
    held = read_json(features / "provenance.json")
    write_json(features / "provenance.json", held | {"config": held["config"] | {"memory": "300MB"}})
    assert {v.outcome for v in audit.audit(features, [])} == {PROVED}


def _noted(limits: list[str], connect: Callable[..., Any], engine: str, **keys: Any) -> Any:
    limits.append(keys["memory"])
    return connect(engine, **keys)


def test_a_limit_of_memory_is_a_number_and_a_unit(features: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["audit", str(features), "--memory", "much"])
    assert stopped.value.code == 2 and "--memory" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(LEAKS))
def test_planted_leak_is_refuted(features: Path, name: str, only: Callable[[str], None]) -> None:
    leak, claim = LEAKS[name]
    leak(features)
    only(claim)
    (verdict,) = [v for v in audit.audit(features, []) if claim in v.claim]
    assert verdict.outcome == REFUTED, verdict


def test_a_series_that_does_not_fit_its_declaration_is_refused(features: Path) -> None:
    change_series(_one_column_more)(features)
    with pytest.raises(UserError, match=r"series\.safetensors: `values`: got .* wanted .* by series\.json"):
        audit.audit(features, [])


# --- runs ------------------------------------------------------------------------------------------------------------


def make_run(folder: Path, config: dict[str, Any], seen: list[int] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if seen is not None:
        pd.DataFrame({"subject_id": seen}).to_parquet(folder / "seen_subjects.parquet")
    return folder


def subjects(features: Path, *splits: str) -> list[int]:
    images = pd.read_parquet(features / "images.parquet")
    return images.loc[images["split"].isin(splits), "subject_id"].unique().tolist()


def pretrain(groups: list[str], init: str | None = None) -> dict[str, Any]:
    return {"encoder": {"arch": "vit", "init": init}, "ehr": {"groups": groups, "preset": "default"}}


def of(found: dict[str, str], what: str) -> str:
    (outcome,) = [o for claim, o in found.items() if what in claim]
    return outcome


def test_run_on_train_subjects_is_proved_and_its_outcome_group_is_listed(features: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pretrain(["sex", "mortality"]), subjects(features, "train"))
    verdicts = audit.audit(features, [run])
    assert {v.outcome for v in verdicts} == {PROVED}
    (said,) = [v.counts for v in verdicts if "no label is among its inputs" in v.claim]
    assert said.endswith("known only at discharge (pretraining only): mortality")


@pytest.mark.parametrize("chained", [False, True])
def test_run_that_saw_a_held_out_subject_is_refuted(features: Path, tmp_path: Path, chained: bool) -> None:
    seen = subjects(features, "train") + subjects(features, "val", "test")[:1]
    run = make_run(tmp_path / "run", pretrain([]), seen)
    if chained:  # a fusion on an encoder that was tuned from one that saw them
        tuned = make_run(tmp_path / "tuned", {"encoder": str(run / "encoder"), "model": "film_only"}, seen[:3])
        run = make_run(tmp_path / "fusion", {"encoder": str(tuned), "model": "medfuse"})
    assert of_run(features, run, "pretraining saw no val or test subject") == REFUTED


@pytest.mark.parametrize(
    "config",
    [pretrain([]), pretrain([], "weights.pth"), {"encoder": "elsewhere/encoder", "model": "concat"}],
    ids=["no list of subjects", "foreign weights", "encoder without its run"],
)
def test_what_cannot_be_known_cannot_be_proved(features: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    needs = isinstance(config["encoder"], dict) and config["encoder"]["init"]
    run = make_run(tmp_path / "run", config, subjects(features, "train") if needs else None)
    assert of_run(features, run, "pretraining saw no val or test subject") == UNKNOWN


@pytest.mark.parametrize("encoder", ["pixels", "random:vit_tiny", "metadata", None])
def test_untrained_features_saw_nobody(features: Path, tmp_path: Path, encoder: str | None) -> None:
    run = make_run(tmp_path / "run", {"encoder": encoder})
    assert of_run(features, run, "pretraining saw no val or test subject") == PROVED


def test_model_of_the_record_alone_needs_no_encoder(features: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"encoder": "elsewhere/encoder", "model": "record_lstm"})
    assert of_run(features, run, "pretraining saw no val or test subject") == PROVED


@pytest.mark.parametrize(
    "config",
    [pretrain(["sex", "Pneumonia"]), pretrain(["race"]), {"encoder": "metadata", "groups": ["age", "mortality"]}],
    ids=["a finding", "a subgroup column", "an outcome in a baseline"],
)
def test_labels_among_a_runs_inputs_are_refuted(features: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", config, subjects(features, "train"))
    assert of_run(features, run, "no label is among its inputs") == REFUTED


def test_encoder_that_hides_an_outcome_is_refuted(features: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pretrain(["mortality"]), subjects(features, "train"))
    (run / "encoder").mkdir()
    (run / "encoder" / "encoder.json").write_text(json.dumps({"ehr_groups": {"mortality": "study"}}))
    assert of_run(features, run, "no label is among its inputs") == REFUTED


def test_predictions_of_train_subjects_are_refuted(features: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"encoder": None})
    (run / "predictions").mkdir()
    pd.DataFrame({"subject_id": subjects(features, "train")[:2]}).to_parquet(run / "predictions" / "test.parquet")
    assert of_run(features, run, "its predictions are of val and test") == REFUTED


def test_changed_raw_tables_prove_nothing(features: Path) -> None:
    change_json("provenance.json", lambda p: [one.update(bytes=1) for one in p["sources"].values()])(features)
    assert of(outcomes(features), "no vital sign or laboratory value") == UNKNOWN


def test_folder_that_is_no_run_is_named(features: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder: it has no config"):
        audit.audit(features, [tmp_path])


@pytest.mark.parametrize("leak", [False, True])
def test_command_exits_2_unless_all_is_proved(
    features: Path, leak: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if leak:
        LEAKS["an outcome said to be known"][0](features)
    monkeypatch.setattr(sys, "argv", ["ehr_features", "audit", str(features)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == (2 if leak else 0)
    said = capsys.readouterr().out
    assert "proved" in said and ("1 claims refuted, 0 cannot be proved" in said) == leak


def test_a_run_that_was_told_notes_reads_no_label(features: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pretrain(["sex", "text"]), subjects(features, "train"))
    assert of_run(features, run, "no label is among its inputs") == PROVED
