"""The values that a synthetic hospital plants before its films, and the Bayes-optimal values that follow from them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from configs import UserError
from ehr_features.demo import generate as demo
from ehr_features.demo.cxr import expected
from ehr_features.demo.people import People, people
from ehr_features.demo.plan import Plan, age_and_sex, hours_between
from ehr_features.demo.record_link import VALUES, plant, posterior, stay_likelihood, strength
from ehr_features.demo.truth import NAMES, PHENOTYPES, Outcomes, amounts, auroc, draw_film, presence
from ehr_features.schema import FINDINGS
from ehr_features.typed import read_json

CHANGED = {"labevents", "chartevents", "vitalsign", "d_items", "d_labitems", "truth", "truth_films", "seal"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    root = tmp_path_factory.mktemp("links")
    for link in (0.0, 1.0):
        demo.generate(root / str(link), subjects=120, seed=2, film_size=32, record_link=link)
    return {link: root / str(link) for link in (0.0, 1.0)}


@pytest.fixture(scope="module")
def many() -> People:
    return people(Plan(subjects=4000, seed=1), Outcomes())


def _present(studies: pd.DataFrame) -> np.ndarray:
    return np.asarray(amounts(studies[[f"x_{name}" for name in NAMES]].to_numpy(float)) > 0)


def test_the_link_changes_the_tables_of_events_alone(made: dict[float, Path]) -> None:
    files = {link: {p.relative_to(o): p.read_bytes() for p in o.rglob("*.*")} for link, o in made.items()}
    assert files[0.0].keys() == files[1.0].keys()
    differ = {path.name.split(".")[0] for path, content in files[0.0].items() if files[1.0][path] != content}
    assert differ == CHANGED


def test_nothing_is_planted_without_a_link(made: dict[float, Path]) -> None:
    unlinked = {path.name: gzip.decompress(path.read_bytes()).decode() for path in made[0.0].rglob("*events.csv.gz")}
    assert len(unlinked) == 2
    for name in ("nt_probnp", "crp", "ventilator"):
        assert all(f",{VALUES[name].item}," not in text for text in unlinked.values())
    assert not any(column.startswith("value_") for column in pd.read_parquet(made[0.0] / "truth_films.parquet"))
    assert "record_link" not in read_json(made[0.0] / "truth.json") and "record_link" in read_json(
        made[1.0] / "truth.json"
    )


def test_the_last_value_known_before_a_film_is_the_planted_one(made: dict[float, Path]) -> None:
    out = made[1.0]
    times = ["charttime", "storetime"]
    labs = pd.read_csv(out / "mimic-iv/hosp/labevents.csv.gz", parse_dates=times)
    chart = pd.read_csv(out / "mimic-iv/icu/chartevents.csv.gz", parse_dates=times)
    signs = pd.read_csv(out / "mimic-iv-ed/ed/vitalsign.csv.gz", parse_dates=["charttime"])
    films = pd.read_csv(out / "mimic-cxr/mimic-cxr-2.0.0-metadata.csv.gz")
    clock = films["StudyTime"].astype(int).astype(str).str.zfill(6)
    films["taken"] = pd.to_datetime(films["StudyDate"].astype(str) + clock, format="%Y%m%d%H%M%S")
    told = pd.read_parquet(out / "truth_films.parquet").merge(films[["dicom_id", "taken"]], on="dicom_id")
    signs = signs.assign(storetime=signs["charttime"], valuenum=signs["o2sat"])
    for name, value in VALUES.items():
        events = labs if value.item < 220000 else chart
        events = events[events["itemid"] == value.item]
        if value.binary:
            events = events.assign(valuenum=(events["value"] == "Endotracheal tube").astype(float))
        events = pd.concat([events, signs]) if name == "spo2" else events
        both = told.merge(events[["subject_id", *times, "valuenum"]].dropna(), on="subject_id")
        both = both[
            both["storetime"].le(both["taken"])
            & (both["taken"] - both["charttime"]).dt.total_seconds().between(0, 86400)
        ]
        last = both.sort_values("charttime").drop_duplicates("dicom_id", keep="last").set_index("dicom_id")["valuenum"]
        pd.testing.assert_series_equal(told["dicom_id"].map(last), told[f"value_{name}"], check_names=False)
        assert told[f"value_{name}"].notna().sum() > 50


@pytest.mark.parametrize("link", [0.5, 1.0, 2.0])
def test_each_value_has_its_strength_and_two_fifths_are_missing(many: People, link: float) -> None:
    planted = plant(Plan(subjects=4000, seed=1, record_link=link), many.subjects, many.studies)
    assert planted is not None
    shown = pd.DataFrame(_present(many.studies), columns=NAMES)
    known = many.studies["subject_id"].map(many.subjects.set_index("subject_id")["kind"]).ne("film").to_numpy()
    for k, (name, value) in enumerate(VALUES.items()):
        score = planted.readings()[:, k]
        held = ~np.isnan(score)
        assert not held[~known].any()
        there = shown[list(value.findings or ("edema",))].any(axis=1).to_numpy(float)
        found = auroc((-1 if value.falls else 1) * score[held], there[held])
        assert found == pytest.approx(strength(value, link), abs=0.03), name
        if name not in ("spo2", "ventilator"):
            assert 1 - held[known].mean() == pytest.approx(0.4, abs=0.03)
    assert strength(VALUES["nt_probnp"], 1) == pytest.approx(0.80) and strength(VALUES["sodium"], 2) == 0.5


def test_values_are_from_after_the_film_before_and_stored_before_their_own(many: People) -> None:
    planted, studies = many.planted, many.studies
    assert planted is not None
    taken = studies["time"].to_numpy().astype("datetime64[s]")[:, None]
    before = studies.groupby("subject_id")["time"].shift().to_numpy().astype("datetime64[s]")[:, None]
    has = ~np.isnan(planted.scores)
    assert (planted.charted <= planted.stored)[has].all() and (planted.stored <= taken)[has].all()
    assert ((taken - planted.charted) <= np.timedelta64(12 * 3600, "s"))[has].all()
    assert ~((planted.charted <= before) & has).any()


@pytest.mark.parametrize("risk", ["level", "change"])
@pytest.mark.parametrize(
    ("age_z", "male", "icu", "rate"), [(0.5, 1.0, 1.0, -1.0), (-1.0, 0.0, 1.0, 0.0), (2, 0, 0.0, 0)]
)
def test_presence_is_the_share_of_drawn_films(risk: str, age_z: float, male: float, icu: float, rate: float) -> None:
    """`draw_film` with risk=change moves the carriers of films outside stays too, which people.py draws as `level`."""
    one = [np.array([x], float) for x in (age_z, male, icu, rate)]
    nodes, weight = np.polynomial.hermite_e.hermegauss(31)
    ours = (presence(*one, risk, nodes)[0] * (weight / weight.sum())[:, None]).sum(0)
    many_ = [np.full(200_000, x, float) for x in (age_z, male, icu)]
    film = draw_film(np.random.default_rng(0), *many_, risk if icu else "level")
    drawn = film[:, : len(NAMES)] + film[:, len(NAMES) :] * rate > 0
    np.testing.assert_allclose(ours, drawn.mean(0), atol=0.005)


def test_the_posterior_is_calibrated_and_no_regression_beats_it(many: People) -> None:
    plan, studies, planted = Plan(subjects=4000, seed=1), many.studies, many.planted
    assert planted is not None
    bayes = expected(*posterior(plan, studies, planted))
    person = expected(*posterior(plan, studies, planted, values=False))
    shown, age_z = pd.DataFrame(_present(studies), columns=NAMES), age_and_sex(studies)[0]
    inputs = np.column_stack(
        [age_z, studies["stay_id"].notna(), np.nan_to_num(planted.scores), np.isnan(planted.scores)]
    ).astype(float)
    for label, drawn, least in (
        ("Edema", "edema", 0.08),
        ("Consolidation", "consolidation", 0.08),
        ("Cardiomegaly", "heart", 0),
    ):
        y, p = shown[drawn].to_numpy(float), bayes[:, FINDINGS.index(label)]
        for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1)):
            held = (p >= low) & (p < high)
            if held.sum() > 100:
                assert y[held].mean() == pytest.approx(p[held].mean(), abs=4 * 0.5 / held.sum() ** 0.5)
        fitted = cross_val_predict(LogisticRegression(max_iter=1000), inputs, y, cv=5, method="predict_proba")[:, 1]
        best, other = roc_auc_score(y, p), roc_auc_score(y, fitted)
        assert other - 0.005 < best < other + 0.03
        assert best > roc_auc_score(y, person[:, FINDINGS.index(label)]) + least


def test_the_best_reader_of_the_record_knows_the_planted_values(many: People) -> None:
    """P(death | record, values) is calibrated, and its AUROC is above that without the values."""
    outcomes = Outcomes()
    stays = many.stays[many.stays["hours"] >= 48].iloc[:1200]
    assert many.planted is not None
    place, (age_z, male) = stays["admission"].to_numpy(), age_and_sex(stays)
    own = many.record[place], many.film[place], age_z, male
    likely = stay_likelihood(many.studies, stays, many.planted)
    linked = outcomes.probabilities(*own, likelihood=likely)
    plain = outcomes.probabilities(*own)
    true = linked["both"]
    np.testing.assert_array_equal(true, plain["both"])
    np.testing.assert_array_equal(linked["film"], plain["film"])
    for k in (0, 1 + list(PHENOTYPES).index(108)):  # death, heart failure
        with_values, without = linked["record"][:, k], plain["record"][:, k]
        for low, high in ((0, 0.15), (0.15, 0.35), (0.35, 0.6), (0.6, 1)):
            held = (with_values >= low) & (with_values < high)
            if held.sum() > 50:
                assert true[held, k].mean() == pytest.approx(with_values[held].mean(), abs=0.03)
        assert auroc(with_values, true[:, k]) > auroc(without, true[:, k]) + 0.003  # type: ignore[operator]
        assert ((with_values - true[:, k]) ** 2).mean() < ((without - true[:, k]) ** 2).mean()


def test_values_of_films_after_hour_48_tell_nothing(many: People) -> None:
    assert many.planted is not None
    stays, studies = many.stays.iloc[:300], many.studies.copy()
    late = studies["stay_id"].notna() & (hours_between(studies["time"], studies["stay_id"].map(
        many.stays.set_index("stay_id")["intime"])) > 60)  # fmt: skip
    films = np.zeros((len(stays), 2, 2 * len(NAMES)))
    films[:, 1, : len(NAMES)] = 1.0
    before = stay_likelihood(studies, stays, many.planted)(slice(0, len(stays)), films)
    changed = plant(Plan(subjects=4000, seed=1), many.subjects, studies)
    assert changed is not None
    changed.scores[late.to_numpy()] = 5.0
    np.testing.assert_array_equal(before, stay_likelihood(studies, stays, changed)(slice(0, len(stays)), films))
    changed.scores[:] = 5.0
    assert (before != stay_likelihood(studies, stays, changed)(slice(0, len(stays)), films)).any()


@pytest.mark.parametrize("link", [-0.1, 2.5, float("nan")])
def test_a_link_out_of_range_is_refused(tmp_path: Path, link: float) -> None:
    with pytest.raises(UserError, match=r"record_link: got .*, wanted 0"):
        demo.generate(tmp_path / "new", subjects=60, record_link=link)
