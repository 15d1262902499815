"""Texts of the synthetic emergency tables: their information, and that other tables do not depend on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from configs import UserError
from ehr_features.demo import generate as demo
from ehr_features.demo import text as demo_text
from ehr_features.demo.cxr import best_auroc, present
from ehr_features.demo.people import people
from ehr_features.demo.plan import Plan
from ehr_features.demo.truth import DEATH, Outcomes, auroc
from ehr_features.schema import FINDINGS

SMALL = {"subjects": 200, "film_size": 32, "seed": 5}


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv.gz", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("told") / "raw"
    demo.generate(out, **SMALL, text_signal=1.0, leak=1.0)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "raw"
    demo.generate(out, **SMALL)
    return out


def test_a_leak_changes_no_other_table(plain: Path, tmp_path: Path) -> None:
    demo.generate(tmp_path / "leaky", **SMALL, leak=1.0)
    for path in sorted(plain.rglob("*.csv.gz")):
        same = path.read_bytes() == (tmp_path / "leaky" / path.relative_to(plain)).read_bytes()
        assert same == (path.name != "triage.csv.gz"), path.name


def test_a_leak_names_what_the_film_of_the_visit_shows(told: Path) -> None:
    plan = Plan(**SMALL, text_signal=1.0, leak=1.0)
    shown = people(plan, Outcomes(text_signal=1.0)).studies.dropna(subset="ed_stay_id")
    shown = shown.drop_duplicates("ed_stay_id", keep="last")
    words = read(told, "mimic-iv-ed/ed/triage").set_index("stay_id")["chiefcomplaint"]
    words = words.reindex(shown["ed_stay_id"].astype(int).astype(str)).to_numpy()
    said = ~np.isin(words, ["UNKNOWN", "___"])
    for name, text in demo_text.LEAKS.items():
        there = (shown[f"x_{name}"] > 0).to_numpy()
        named = np.array([text in word for word in words])
        assert named[there & said].all() and not named[~there].any() and there.any(), name


def test_frailty_moves_death_as_much_as_stated() -> None:
    outcomes = Outcomes(text_signal=1.0)
    everyone = [people(Plan(subjects=2500, seed=seed, text_signal=1.0), outcomes) for seed in (1, 2)]
    rows = pd.concat([e.admissions[e.admissions["icu"]] for e in everyone])
    assert abs(rows["died"].mean() - DEATH["prevalence"]) < 0.03
    died = [rows.loc[rows["frail"] == sign, "died"].mean() for sign in (1, -1)]
    assert died[0] > died[1] + 0.15
    quiet = people(Plan(subjects=2500, seed=1), Outcomes()).admissions
    quiet = quiet[quiet["icu"]]
    assert abs(quiet.loc[quiet["frail"] == 1, "died"].mean() - quiet.loc[quiet["frail"] == -1, "died"].mean()) < 0.06


def test_the_stated_values_are_those_of_drawn_deaths(told: Path) -> None:
    stays = pd.concat(
        demo._stays_truth(everyone, _films(everyone), outcomes)
        for outcomes in [Outcomes(text_signal=1.0)]
        for everyone in [people(Plan(subjects=2500, seed=seed, text_signal=1.0), outcomes) for seed in (1, 2)]
    )
    for reader in ("record", "film", "text", "both", "both_text"):
        stated = auroc(stays[f"death_{reader}"].to_numpy(), stays["death_true"].to_numpy())
        assert stated is not None and abs(roc_auc_score(stays["died"], stays[f"death_{reader}"]) - stated) < 0.03
    best = json.loads((told / "truth.json").read_text())["bayes"]["mortality"]
    assert best["both_text"] > best["both"] + 0.01 and best["text"] > 0.6


def _films(everyone: object) -> pd.DataFrame:
    return pd.DataFrame({"view": ["AP"], "stay_id": [np.nan], "time": [pd.Timestamp(0)]})


def test_fractures_are_told_by_the_note_and_by_no_film(told: Path) -> None:
    best = json.loads((told / "truth.json").read_text())["bayes"]
    assert best["findings"]["Fracture"] == 0.5
    assert best["findings_film_text"]["Fracture"] > 0.6 and best["findings_text"]["Fracture"] > 0.6
    assert best["findings_film_text"]["Pneumonia"] > best["findings"]["Pneumonia"]
    assert best["findings_film_text"]["Edema"] == best["findings"]["Edema"]


def test_without_a_signal_the_film_alone_is_as_good(plain: Path) -> None:
    best = json.loads((plain / "truth.json").read_text())["bayes"]
    assert "findings_text" not in best and "both_text" not in best["mortality"]
    shown = np.random.default_rng(0).standard_normal((50, 10)).clip(0)
    quiet = present(shown, np.zeros(50))
    films = pd.DataFrame({"view": "AP", "study": range(50)})
    assert best_auroc(films, quiet, quiet)["Fracture"] == 0.5 and set(best_auroc(films, quiet, quiet)) == set(FINDINGS)


def test_home_drugs_have_a_row_for_each_class_and_tell_of_frailty(told: Path, plain: Path) -> None:
    for folder in (told, plain):
        recon = read(folder, "mimic-iv-ed/ed/medrecon")
        twice = recon.duplicated(["stay_id", "charttime", "name"], keep=False)
        assert {"1", "2"} == set(recon["etc_rn"]) and recon.loc[twice, "etc_rn"].eq("2").any()
    visits = people(Plan(**SMALL, text_signal=1.0), Outcomes(text_signal=1.0)).visits
    recon = read(told, "mimic-iv-ed/ed/medrecon").drop_duplicates(["stay_id", "name"])
    count = recon[recon["name"].isin(demo_text.FRAIL_DRUGS)].groupby("stay_id").size()
    count = count.reindex(visits["ed_stay_id"].astype(str), fill_value=0)
    assert roc_auc_score(visits["frail"] > 0, count) > 0.95


def test_wild_values_are_refused(tmp_path: Path) -> None:
    for wrong in ({"text_signal": -1.0}, {"leak": 2.0}):
        with pytest.raises(UserError):
            demo.generate(tmp_path / "new", **(SMALL | wrong))
