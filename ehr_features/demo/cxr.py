"""Draw chest films in numpy and write them as MIMIC-CXR-JPG 2.0.0 with metadata, split and chexpert tables."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from configs import UserError
from configs.launch import end_with_me
from configs.threads import cores
from ehr_features.demo.people import People
from ehr_features.demo.plan import Plan
from ehr_features.demo.record_link import COMBINATIONS, LINKED, posterior
from ehr_features.demo.tables import columns, write_csv
from ehr_features.demo.thorax import Canvas, Textures, frontal, lateral
from ehr_features.demo.truth import NAMES, Array, amounts, auroc
from ehr_features.schema import FINDINGS, FRONTAL

DRAWN = {
    "Atelectasis": "atelectasis", "Cardiomegaly": "heart", "Consolidation": "consolidation", "Edema": "edema",
    "Enlarged Cardiomediastinum": "mediastinum", "Lung Lesion": "lesion", "Pleural Effusion": "effusion",
    "Pneumothorax": "pneumothorax", "Support Devices": "device",
}  # fmt: skip
NOT_DRAWN = {"Fracture": 0.04, "Pleural Other": 0.03}  # not drawn into any film: best possible AUROC .5
CALLED, UNSEEN = 0.65, 0.03  # P(pneumonia | consolidation), P(pneumonia | none)
MANY = 1000  # films that are worth a process of their own
HAZY = 0.4  # P(lung opacity | atelectasis alone)
METADATA = columns(
    "dicom_id subject_id study_id PerformedProcedureStepDescription ViewPosition Rows Columns StudyDate StudyTime "
    "ProcedureCodeSequence_CodeMeaning ViewCodeSequence_CodeMeaning PatientOrientationCodeSequence_CodeMeaning"
)
# label noise: shares of present and of absent findings that are labelled 1, -1, 0 (the rest is empty)
PRESENT, ABSENT = (0.90, 0.05, 0.01), (0.01, 0.02, 0.22)


def write_cxr(people: People, plan: Plan, out: Path) -> tuple[dict[str, int], pd.DataFrame, dict[str, Array]]:
    """Write the tables; `drawing` adds the films.

    Returns: row counts, the films table (with what was drawn), and P(finding), (studies, 14), as computed from all
        latents (`true`), from the film, from film and note (`film_text`), and a score of the note alone (`text`); with
        planted values also from the record alone (`record`), and from age, sex and place alone (`person`).
    """
    rng = np.random.default_rng([plan.seed, 5])
    studies = people.studies
    shown = amounts(studies[[f"x_{name}" for name in NAMES]].to_numpy(float))
    frail = plan.text_signal * studies["frail"].to_numpy()
    true = present(shown, frail)
    labels = pd.DataFrame(_labels(rng, true), columns=FINDINGS)
    if plan.shuffled:
        labels = pd.DataFrame(np.roll(labels.to_numpy(), len(labels) // 2, axis=0), columns=FINDINGS)
    chexpert = pd.concat([studies[["subject_id", "study_id"]], labels], axis=1)
    chexpert = chexpert[rng.random(len(chexpert)) >= 0.003]  # a few studies have no labels
    films = _films(rng, people, plan)
    films[list(NAMES)] = shown[films["study"]]
    counts = {
        "cxr/metadata": write_csv(films[METADATA], out / "mimic-cxr-2.0.0-metadata.csv.gz"),
        "cxr/split": write_csv(
            films[["dicom_id", "study_id", "subject_id", "split"]], out / "mimic-cxr-2.0.0-split.csv.gz"
        ),
        "cxr/chexpert": write_csv(chexpert, out / "mimic-cxr-2.0.0-chexpert.csv.gz"),
    }
    films["subject"] = pd.factorize(films["subject_id"])[0]
    counts["cxr/films"] = len(films)
    readers = {"true": true, "film": (present(shown, abs(frail)) + present(shown, -abs(frail))) / 2}
    told = studies["told"].to_numpy()
    readers["film_text"] = np.where(told[:, None], true, readers["film"])
    if people.planted is not None:
        for name, values in (("record", True), ("person", False)):
            readers[name] = expected(*posterior(plan, studies, people.planted, values=values))
    readers["text"] = np.tile((plan.text_signal * studies["frail"] * told).to_numpy()[:, None], len(FINDINGS))
    return counts, films, readers


@contextmanager
def drawing(films: pd.DataFrame, plan: Plan, out: Path) -> Iterator[None]:
    """Draw the films of `write_cxr`: many of them in a second process, beside what is done within; few at its end.

    Raises: what stopped the drawing, when the block ends.
    """
    if len(films) < MANY or cores() == 1:
        yield
        draw_films(films, plan, out)
        return
    words, tied = [sys.executable, "-m", __name__], end_with_me(os.getpid())

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends it
        tied()

    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=prepare) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError), process.stdin:  # it has ended: said below
                pickle.dump((films, plan, out), process.stdin)
            yield
            error = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        ended = f"the process that draws the films ended with code {process.returncode}; killed for lack of memory?"
        raise pickle.loads(error) if error else UserError(ended)


def draw_films(films: pd.DataFrame, plan: Plan, out: Path) -> None:
    """Draw and write each film as JPEG."""
    paths = [
        f"p{str(s)[:2]}/p{s}/s{t}/{d}.jpg"
        for s, t, d in zip(films["subject_id"], films["study_id"], films["dicom_id"], strict=True)
    ]
    for folder in {Path(path).parent for path in paths}:
        (out / "files" / folder).mkdir(parents=True, exist_ok=True)
    looks = films[["subject", "male", "age", "view", "wide", "recumbent", *NAMES]]
    views, white = films["view"].to_numpy(), _white(films, plan)
    batches = draw(looks, plan.film_size, np.random.default_rng([plan.seed, 6]))
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("drawing films", total=len(films))
        for rows, drawn in batches:
            for row, film in zip(rows, drawn, strict=True):
                if plan.view_shortcut and KINDS[views[row]] == "frontal":
                    boxes(film, white[row], plan.film_size)
                Image.fromarray(film).save(out / "files" / paths[row], quality=90)
            bar.advance(task, len(rows))


def present(shown: Array, frail: Array) -> Array:
    """P(finding | drawn amounts, frailty x signal), (studies, 14): 0 or 1 for drawn findings, else a prevalence.

    In frail patients a consolidation is labelled pneumonia more often, and there are fractures that no film shows.
    """
    there = pd.DataFrame(shown > 0, columns=NAMES).astype(float)
    table = pd.DataFrame({name: there[drawn] for name, drawn in DRAWN.items()})
    called = CALLED + 0.30 * np.clip(frail, -1, 1)
    table["Pneumonia"] = called * there["consolidation"] + UNSEEN * (1 - there["consolidation"])
    table["Lung Opacity"] = there[["consolidation", "edema", "lesion"]].max(axis=1)
    table["Lung Opacity"] = table["Lung Opacity"].where(table["Lung Opacity"] > 0, HAZY * there["atelectasis"])
    for name, share in NOT_DRAWN.items():
        table[name] = share
    table["Fracture"] *= 1 + 0.95 * np.clip(frail, -1, 1)
    abnormal = there.drop(columns=["device", "hyper"]).max(axis=1)
    table["No Finding"] = 1.0 - abnormal
    return table[list(FINDINGS)].to_numpy()


def expected(weight: Array, p: Array) -> Array:
    """P(finding) of a reader who knows only how probable each drawn finding is; (studies, 14), as `present` gives it.

    Args:
        weight, p: as `record_link.posterior` returns them.
    """
    there = dict(zip(LINKED, COMBINATIONS.T.astype(float), strict=True))  # name -> (C,)
    there |= {name: p[..., NAMES.index(name), None] for name in NAMES if name not in there}  # (studies, Q, 1)

    def mean(value: Array) -> Array:
        return np.asarray((weight * value).sum((1, 2)))

    table = {name: mean(there[drawn]) for name, drawn in DRAWN.items()}
    table["Pneumonia"] = mean(CALLED * there["consolidation"] + UNSEEN * (1 - there["consolidation"]))
    clear = (1 - there["consolidation"]) * (1 - there["edema"]) * (1 - there["lesion"])
    table["Lung Opacity"] = 1 - mean(clear * (1 - HAZY * there["atelectasis"]))
    table |= {name: np.full(len(p), share) for name, share in NOT_DRAWN.items()}
    absent: Array = np.ones(1)
    for name in set(NAMES) - {"device", "hyper"}:
        absent = absent * (1 - there[name])
    table["No Finding"] = mean(absent)
    return np.stack([table[name] for name in FINDINGS], 1)


def written(probability: Array) -> tuple[Array, Array]:
    """P(label = 1) and P(label = -1) from P(finding is present)."""
    return tuple(probability * PRESENT[k] + (1 - probability) * ABSENT[k] for k in (0, 1))  # type: ignore[return-value]


def best_auroc(films: pd.DataFrame, true: Array, reader: Array) -> dict[str, float | None]:
    """Expected AUROC of a reader over frontal films: 1 against 0 and empty; -1 is left out.

    Args:
        true, reader: (studies, 14): P(finding), and the reader's score of it.
    """
    frontal = films.loc[films["view"].isin(FRONTAL), "study"]
    best = {}
    for k, name in enumerate(FINDINGS):
        one, unsure = written(true[frontal, k])
        best[name] = auroc(reader[frontal, k], one / (1 - unsure))
    return best


def _white(films: pd.DataFrame, plan: Plan) -> Array:
    """(films, findings) bool: which boxes are white; see `Plan.view_shortcut`."""
    there, portable = films[list(NAMES)].to_numpy() > 0, (films["view"] == "AP").to_numpy()
    chance = 0.5 + 0.5 * plan.view_shortcut * np.where(there == portable[:, None], 1, -1)
    return np.asarray(np.random.default_rng([plan.seed, 9]).random(chance.shape) < chance)


def _labels(rng: np.random.Generator, true: Array) -> Array:
    there = rng.random(true.shape) < true
    share = np.where(there[..., None], PRESENT, ABSENT).cumsum(-1)
    place = (rng.random(true.shape)[..., None] > share).sum(-1)
    return np.array([1.0, -1.0, 0.0, np.nan])[place]


def _films(rng: np.random.Generator, people: People, plan: Plan) -> pd.DataFrame:
    """One row per film: the frontal of each study, a lateral with most PA and some AP films outside the ICU, a few
    repeats."""
    studies = people.studies.assign(study=np.arange(len(people.studies)), order=0)
    inside = studies["stay_id"].notna().to_numpy()
    lateral = studies[~inside & (rng.random(len(studies)) < np.where(studies["view"] == "PA", 0.8, 0.25))]
    lateral = lateral.assign(order=1, recumbent=False, view=rng.choice(["LATERAL", "LL"], len(lateral), p=[0.7, 0.3]))
    again = studies[inside & (rng.random(len(studies)) < 0.10)].assign(order=2)
    films = pd.concat([studies, lateral, again]).sort_values(["study", "order"], ignore_index=True)
    count = len(films)
    raw = rng.integers(0, 2**32, (count, 5), dtype=np.uint64)
    films["dicom_id"] = ["-".join(f"{part:08x}" for part in row) for row in raw]
    films["split"] = films["subject_id"].map(people.subjects.set_index("subject_id")["pinned"])
    films["wide"] = rng.random(count) < films["view"].map(WIDE)
    shape = pd.Series([SHAPES[KINDS[view], wide] for view, wide in zip(films["view"], films["wide"], strict=True)])
    films["Rows"] = (plan.film_size * shape.str[0]).round().astype(int)
    films["Columns"] = (plan.film_size * shape.str[1]).round().astype(int)
    films["StudyDate"] = films["time"].dt.strftime("%Y%m%d").astype(int)
    clock = films["time"].dt.hour * 10000 + films["time"].dt.minute * 100 + films["time"].dt.second
    films["StudyTime"] = clock + np.where(rng.random(count) < 0.6, rng.integers(1, 999, count) / 1000, 0.0)
    portable = films["view"] == "AP"
    films["PerformedProcedureStepDescription"] = np.where(portable, "CHEST (PORTABLE AP)", "CHEST (PA AND LAT)")
    films["ProcedureCodeSequence_CodeMeaning"] = films["PerformedProcedureStepDescription"]
    films["ViewCodeSequence_CodeMeaning"] = films["view"].map(
        {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral", "LL": "left lateral"}
    )
    shown, unsaid = rng.random(count) >= 0.05, rng.random(count) < 0.01
    films["ViewPosition"] = films["view"].where(shown)
    films["ViewCodeSequence_CodeMeaning"] = films["ViewCodeSequence_CodeMeaning"].where(~unsaid)
    position = np.where(films["recumbent"], "Recumbent", "Erect")
    films["PatientOrientationCodeSequence_CodeMeaning"] = pd.Series(position).mask(rng.random(count) < 0.11)
    return films


# ---- Films, batch by batch: anatomy (thorax.py), exposure and burnt-in marks

KINDS = {"AP": "frontal", "PA": "frontal", "LATERAL": "lateral", "LL": "lateral"}
# height and width relative to the size; wide films are rotated, AP films more often than PA films
SHAPES = {("frontal", False): (1.0, 0.86), ("frontal", True): (0.86, 1.0), ("lateral", False): (1.0, 0.80)}
WIDE = {"AP": 0.55, "PA": 0.15, "LATERAL": 0.0, "LL": 0.0}


def draw(films: pd.DataFrame, size: int, rng: np.random.Generator, batch: int = 32) -> Iterator[tuple[Array, Array]]:
    """Draw every film.

    Args:
        films: columns subject (0, 1, ...), male, age, view (PA, AP, LATERAL, LL), wide, recumbent, and a column for
            each of `truth.NAMES`.
        size: the longer side, in pixels.
    Yields: row numbers (B,) and films (B, H, W) uint8; films of one shape come together.
    """
    textures = Textures(rng, size)
    count = int(films["subject"].max()) + 1 if len(films) else 0
    traits = rng.standard_normal((count, 64)).astype(np.float32), rng.random((count, 64), np.float32)
    kind = films["view"].map(KINDS).to_numpy()
    for (name, turned), (high, wide) in SHAPES.items():
        rows = np.flatnonzero((kind == name) & (films["wide"].to_numpy() == turned))
        for start in range(0, len(rows), batch):
            part = films.iloc[rows[start : start + batch]]
            canvas = Canvas(part, (round(size * high), round(size * wide)), rng, textures, traits)
            yield rows[start : start + batch], expose(canvas, (frontal if name == "frontal" else lateral)(canvas))


def expose(canvas: Canvas, density: Array) -> Array:
    """Turn density, about 0 (air) to 1.2 (bone), into uint8 films: exposure, gamma, noise, black edges, the side
    marker."""
    density = density * (1 + canvas.normal(0.05)) + canvas.normal(0.03)
    tilt = canvas.normal(0.03) * canvas.x + canvas.normal(0.03) * canvas.y
    image = np.clip((density + tilt * (density > 0.05)) / 1.12, 0, 1.2) ** np.exp(canvas.normal(0.16))
    image = image + canvas.uniform(0.006, 0.02) * canvas.rng.standard_normal(density.shape, np.float32)
    image = (image + canvas.uniform(0.004, 0.015) * canvas.grain(0)) * canvas.uniform(0.88, 1.0)
    for axis, places in zip((1, 2), canvas.shape, strict=True):  # black edges on a few
        cut = canvas.some(0.12) * canvas.uniform(0, 0.06) * places
        line = np.arange(places, dtype=np.float32).reshape((1, -1, 1) if axis == 1 else (1, 1, -1))
        image = image * ((line >= cut) & (line < places - cut * canvas.some(0.5)))
    films: Array = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    for film in films:
        _mark(film, canvas.rng)
    return films


def boxes(film: Array, white: Array, size: int) -> None:
    """Burn in a strip of white or black boxes near the lower edge, at the same place for films of any shape.

    Args:
        white: (K,) bool, from left to right.
        size: the longer side of films, in pixels.
    """
    side, pitch = max(round(0.05 * size), 2), 0.08 * size
    top = round(film.shape[0] / 2 + 0.36 * size)
    for k, on in enumerate(white):
        left = round(film.shape[1] / 2 + (k - len(white) / 2) * pitch)
        film[top : top + side, left : left + side] = 245 if on else 10


def _mark(film: Array, rng: np.random.Generator) -> None:
    """Burn in the side marker: L near the image's right upper edge, R near the left."""
    scale = max(film.shape[0] // 64, 1)
    letter = "L" if rng.random() < 0.7 else "R"
    rows = {"L": ("100", "100", "100", "100", "111"), "R": ("110", "101", "110", "110", "101")}[letter]
    glyph = np.kron(np.array([[c == "1" for c in row] for row in rows]), np.ones((scale, scale), bool))
    height, width = film.shape
    top = int(height * rng.uniform(0.04, 0.14))
    left = int(width * (rng.uniform(0.86, 0.92) if letter == "L" else rng.uniform(0.04, 0.09)))
    patch = film[top : top + glyph.shape[0], left : left + glyph.shape[1]]
    patch[glyph[: patch.shape[0], : patch.shape[1]]] = 245


if __name__ == "__main__":
    try:
        draw_films(*pickle.load(sys.stdin.buffer))
    except Exception as error:
        if not isinstance(error, OSError):  # a bug: its place is known here alone
            traceback.print_exc()
        pickle.dump(error, sys.stdout.buffer)
        sys.exit(1)
