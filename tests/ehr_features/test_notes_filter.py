"""The leak filter: removed and kept texts, and its dependence on the text alone."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_features.notes import leak_filter as notes_filter
from ehr_features.notes.leak_filter import GAP, apply, remove, remove_all
from ehr_features.notes.template import SHIPPED
from ehr_features.schema import FINDINGS

NUMBER = re.compile(r"\d+(?:\.\d+)?")
PIECES = [
    *("pneumonia", "PNA", "ptx", "CHF exacerbation", "Pleural", "effusion", "bilateral", "acute", "edema", "CXR", "fx"),
    *("fever", "productive cough", "SOB", "99.5", "37.2 C", "0.4", "3", "history of", "left", "and", "or", "with", "/"),
    *(", ", "; ", ". ", ": ", ".", "\n", " ", " ", " ", "(", ")", "Chief complaint", "Diagnoses", "?", "on", "lung"),
]
texts = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.lists(st.sampled_from(PIECES)).map(" ".join)
NAMED = (
    "PNA, PTX, CHF, ptx, Pneumothoraces, pleural effusions, Edema, pulm edema, atelectatic, fx, PPM, "
    "cardiomegaly, fractures, rib fx, lung nodules, RLL infiltrate, opacities, CXR, chest x-ray, xray, CT "
    "scan, pacemaker, ETT, widened mediastinum, empyema, consolidations, no findings, Heart Failure, "
    "C.H.F, p.n.a, HF exacerbation, pnuemonia, fluid overloaded, U/S, x-rayed, cardio-megaly, lung mets, "
    "collapse of lung, ultra-sound, roentgenogram, hemo/pneumothorax, PA/lateral, fxd, plural effusion, "
    "mass on lung, heart enlarged"
)
modes = st.sampled_from(["standard", "aggressive"])


@pytest.mark.parametrize("mode", ["standard", "aggressive"])
@pytest.mark.parametrize("name", FINDINGS)
def test_the_name_of_a_finding_goes_in_any_case(name: str, mode: str) -> None:
    for text in (name, name.lower(), name.upper(), name.title()):
        assert remove(f"fever, {text}, cough", mode) == "fever, cough"
        assert remove(f"Chief complaint: {text}.", mode) == ""


@pytest.mark.parametrize(
    "leak",
    NAMED.split(", "),
)
def test_abbreviations_plurals_and_the_language_of_radiology_go(leak: str) -> None:
    assert remove(f"fever and {leak}") == "fever"
    assert remove(f"{leak}, cough") == "cough"


@pytest.mark.parametrize(
    "text",
    [
        "Chief complaint: fever, productive cough.",
        "Temperature 99.5 F, dose 0.25 mg, pH 7.35.",
        "Home medication: Furosemide; CTX.",  # CT within a word
        "chfx, ptxy, factual, consolation, hapless",
        "chest pain, dyspnea on exertion, shortness of breath, hemoptysis",
        "Fièvre 38,5, naïptx, éfx, ctä, жpna, pneumoni\u0301a",  # terms within words of other alphabets
        "syncope and collapse, chest congestion, broken tooth",
        "told us, half, a.m., p.t., e.g. c.tx, pet, fraction",
    ],
)
def test_what_names_no_finding_stays_to_the_byte(text: str) -> None:
    assert remove(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("fever, C.H.F., cough 99.5", "fever, cough 99.5"),
        ("___PNA, cough, fever_x", "___, cough, fever_x"),
        ("fever, denies CHF, no evidence of PNA, pneumothorax ruled out, not edema", "fever"),
        ("pneumonia's, x-ray\u2019d, fever", "fever"),
        ("Chief complaint: fever, productive cough and pneumonia.", "Chief complaint: fever, productive cough."),
        ("Temp 99.5. Pneumonia. Next 3.4 mg.", "Temp 99.5. Next 3.4 mg."),
        ("Temperature 37.5 C, complaint: pneumonia.", "Temperature 37.5 C."),
        ("?PTX, r/o PNA, SOB, 99.5", "SOB, 99.5"),
        ("sob / chf / cough", "sob / cough"),
        ("cough (r/o pneumonia) 98.6.", "cough 98.6."),
        ("pleural pneumonia effusion", ""),  # what a removal brings together is a term
        ("cardiomegaly on CXR", ""),
        ("Fever.\nPneumothorax\nT 38.5", "Fever.\nT 38.5"),
        (
            "Diagnoses: Pneumonia due to Klebsiella; Gout, unspecified; Other heart failure.",
            "Diagnoses: Gout, unspecified.",
        ),
        ("Diagnoses: Gout; Pneumonia in E. coli; E. x; Other edema; Cold.", "Diagnoses: Gout; E. x; Cold."),
        ("Diagnoses: Gout; Pneumonia due to E. coli. Dose 0.5", "Diagnoses: Gout. Dose 0.5"),
        ("Admissions: 3. Diagnoses of them: Pneumonia. Dose 0.5", "Admissions: 3. Dose 0.5"),
        ("after rib fracture, pain", "pain"),
        ("complains of PNA, found to have ptx", ""),
        ("trach-dependent, CHF.exac, PNA-99.5, 38.5-PNA", "dependent, exac, 99.5, 38.5"),
        ("PNA--CHF, fever.PNA. 38.5", "fever. 38.5"),
        ("Chief complaint: CXR: RLL PNA.", ""),
        ("Chief complaint: +CXR, (-) PNA, fever, CT (+), PNA-, abnormal xray neg.", "Chief complaint: fever."),
    ],
)
def test_what_is_left_reads_as_if_nothing_had_been_there(text: str, left: str) -> None:
    assert remove(text) == left


def test_aggressive_takes_more_than_standard() -> None:
    text = "lung cancer screening, swelling, sepsis, fever"
    assert remove(text, "none") == text and remove(text) == "screening, swelling, sepsis, fever"
    assert remove(text, "aggressive") == "screening, fever"


def test_the_words_of_the_shipped_template_are_no_leaks() -> None:
    lines = [line for line in SHIPPED.read_text().splitlines() if line and not line.startswith(("#", "["))]
    text = "\n".join(
        re.sub(r"\{\w+\}", "1", line).replace("[", "").replace("]", "").replace("|", ",") for line in lines
    )
    assert len(lines) > 8 and remove(text, "aggressive") == text


@given(texts, modes)
@settings(max_examples=120, deadline=None)
def test_filtering_twice_is_filtering_once_and_no_term_is_left(text: str, mode: str) -> None:
    once = remove(text, mode)
    assert remove(once, mode) == once and GAP not in once
    leaks = notes_filter.read(mode)
    assert leaks is not None and not re.search(leaks.any_term, once)


@pytest.mark.parametrize(
    "leak", ["pneu\u00admonia", "pleu\u200bral effusion", "\uff30\uff2e\uff21", "\ufb02uid overload"]
)
def test_a_term_is_found_behind_signs_that_do_not_show(leak: str) -> None:
    assert remove(f"fever, {leak}") == "fever"


def test_other_alphabets_stand_beside_terms_as_words_do() -> None:
    assert remove("Fièvre, PNA, Schüttelfrost; chest x\u2011ray") == "Fièvre, Schüttelfrost"
    assert remove("é, pulmonary\u00a0edema, 发烧PNA, cough") == "é, 发烧, cough"


@given(
    st.lists(st.sampled_from([*PIECES, "é", "ï ", "\u0301", "ж", "发烧", "_", "\u2011"]), max_size=20).map("".join),
    modes,
)
@settings(max_examples=120, deadline=None)
def test_text_without_a_term_stays_to_the_byte_in_any_alphabet(text: str, mode: str) -> None:
    left, counts = apply(pa.array([text]), mode)
    if not sum(count.to_pylist()[0] for count in counts.values()):
        assert left.to_pylist() == [text]
    assert not set(left.to_pylist()[0]) & {"\ue000", "\ue001", "\ue002"}
    assert remove(left.to_pylist()[0], mode) == left.to_pylist()[0]
    assert sorted(re.findall("[éïж发烧\u0301]", left.to_pylist()[0])) == sorted(re.findall("[éïж发烧\u0301]", text))


@given(texts, modes)
@settings(max_examples=120, deadline=None)
def test_numbers_stay_as_they_are_and_in_order(text: str, mode: str) -> None:
    if "iagnos" in text and ";" in text + ";":  # there whole items go
        text = text.replace("Diagnoses", "Complaints")
    assert NUMBER.findall(remove(text, mode)) == NUMBER.findall(text)


@given(st.lists(texts, max_size=6), modes)
@settings(max_examples=40, deadline=None)
def test_a_text_is_filtered_alike_alone_and_among_others(many: list[str], mode: str) -> None:
    assert remove_all(many, mode) == [remove(text, mode) for text in many]


@given(st.lists(texts.map(lambda t: t.replace("\n", " ")), min_size=1, max_size=4), modes)
@settings(max_examples=80, deadline=None)
def test_a_note_is_filtered_line_by_line(lines: list[str], mode: str) -> None:
    lines = [line.strip() for line in lines if line.strip()]
    left = [text for text in remove_all(lines, mode) if text]
    assert remove("\n".join(lines), mode) == "\n".join(left)


def test_missing_texts_stay_missing_and_every_removal_is_counted() -> None:
    left, counts = apply(pa.array(["PNA and PTX, cough", None, "cough", "pneumonia"]), "standard")
    assert left.to_pylist() == ["cough", None, "cough", ""]
    assert counts["Pneumonia"].to_pylist() == [1, 0, 0, 1] and counts["Pneumothorax"].to_pylist() == [1, 0, 0, 0]
