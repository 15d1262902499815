"""The whole extraction on a tiny MIMIC: content of the folder, cache, layouts, bad input, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from configs import UserError, load
from ehr_features import build, schema, series
from ehr_features.check import check, num_rows
from ehr_features.config import FeaturesConfig
from ehr_features.demo import generate as demo
from ehr_features.files import PARTIAL, read_table, tidy
from ehr_features.raw.source import open_source
from ehr_features.series import bins, events, file
from ehr_features.series.channels import SHIPPED

ALL = ("mortality", "phenotypes", "phenotypes_early", "decompensation", "length_of_stay")


@pytest.fixture
def mimic(tmp_path, frames, write):
    return write(tmp_path / "mimic", frames)


def same(one, two) -> None:
    """Two features folders hold the same tables and series."""
    names = sorted(p.relative_to(one).as_posix() for p in one.rglob("*.parquet"))
    assert names == sorted(p.relative_to(two).as_posix() for p in two.rglob("*.parquet")) and names
    for name in names:
        pd.testing.assert_frame_equal(pd.read_parquet(one / name), pd.read_parquet(two / name))
    a, b = (load_file(folder / "series.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_the_folder_keeps_its_contract(mimic, config):
    out = build.build(config(tasks=ALL))
    said = json.loads((out / "schema.json").read_text())
    for path in out.rglob("*.parquet"):
        table = pd.read_parquet(path)
        assert list(said[path.relative_to(out).with_suffix("").as_posix()]) == list(table.columns), path
        if path.parent.name == "samples":
            assert list(table.columns[: len(schema.SAMPLES)]) == list(schema.SAMPLES)
            assert table.sample_id.is_unique and set(table.split) <= {"train", "val", "test"}
    tensors = load_file(out / "series.safetensors")
    about = json.loads((out / "series.json").read_text())
    assert tensors["values"].shape[1] + tensors["observed"].shape[1] == len(about["columns"]) == 35
    assert tensors["values"].dtype == np.float32 and tensors["observed"].dtype == np.uint8
    assert tensors["stay_id"].tolist() == read_table(out, "stays")["stay_id"].tolist()
    record = json.loads((out / "provenance.json").read_text())
    assert record["rows_read"]["icustays"] == 8 and record["layout"] == "2.2"
    assert record["rows_read"]["chartevents"] == len(pd.read_csv(mimic / "icu/chartevents.csv.gz"))
    assert not list(out.parent.glob(".*partial*"))


def test_1_0_2_0_2_2_and_parquet_give_the_same_features(tmp_path, frames, write, config):
    first = build.build(config(mimic_iv=str(write(tmp_path / "a", frames, "2.2")), out=tmp_path / "fa"))
    for name, layout, suffix in (("b", "1.0", ".csv.gz"), ("c", "2.0", ".csv"), ("d", "2.2", ".parquet")):
        root = write(tmp_path / name, frames, layout, suffix)
        same(first, build.build(config(mimic_iv=str(root), out=tmp_path / f"f{name}")))


FOLDERS = {"mimic_iv": "mimic-iv", "mimic_cxr": "mimic-cxr", "mimic_ed": "mimic-iv-ed"}


@pytest.fixture(scope="module")
def with_films(tmp_path_factory):
    """Raw tables with films and emergency stays, and the features built from them."""
    root = tmp_path_factory.mktemp("films")
    demo.generate(root / "raw", subjects=50, seed=5, film_size=32)
    roots = {key: str(root / "raw" / name) for key, name in FOLDERS.items()}
    tasks = (*ALL, "findings")
    return root / "raw", build.build(FeaturesConfig(**roots, out=root / "features", memory="800MB", tasks=tasks))


IDS = ("subject_id", "hadm_id", "stay_id", "study_id", "specimen_id", "itemid", "anchor_age")


def damaged(table: pd.DataFrame, form: str) -> pd.DataFrame:
    """A raw table, read as text, as other programs save it: ids in other forms, and rows without ids in the middle."""
    half = len(table) // 2
    junk = {"blank": [""] * len(table.columns), "header": list(table.columns), "words": ["?"] * len(table.columns)}
    ids = [c for c in table if c in IDS]
    table = table.copy()
    for c in ids:
        other = {"blanks": lambda i: f" 0{i} ", "floats": lambda i: f"{i}.0", "exponents": lambda i: f"{int(i):.9e}"}
        if form in other:
            table[c] = table[c].map(lambda i, write=other[form]: i and write(i))
    added = ["blank"] if form == "numbers" else list(junk)
    rows = pd.DataFrame([junk[kind] for kind in added], columns=table.columns)
    table = pd.concat([table[:half], rows, table[half:]], ignore_index=True)
    if form == "numbers":  # of Parquet, floats where one is empty
        table[ids] = table[ids].apply(pd.to_numeric)
    return table


@pytest.mark.parametrize(
    ("form", "suffix"), [("blanks", ".csv"), ("floats", ".csv.gz"), ("exponents", ".csv"), ("numbers", ".parquet")]
)
def test_ids_in_any_form_give_the_same_and_rows_without_them_are_counted(tmp_path, with_films, form, suffix, capsys):
    raw, one = with_films
    for path in raw.rglob("*.csv.gz"):
        table = damaged(pd.read_csv(path, dtype=str, keep_default_na=False), form)
        to = tmp_path / path.relative_to(raw).with_name(path.name.replace(".csv.gz", suffix))
        to.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(to) if suffix == ".parquet" else table.to_csv(to, index=False)
    roots = {key: str(tmp_path / name) for key, name in FOLDERS.items()}
    config = FeaturesConfig(**roots, out=tmp_path / "two", memory="800MB", tasks=(*ALL, "findings"))
    same(one, build.build(config))
    told = json.loads((tmp_path / "two/attrition.json").read_text())["exclusions"]
    lacking = re.compile(r"no (\w+_id|itemid|icd_code)( or |, |$)")
    dropped = {e["table"]: e["before"] - e["after"] for e in told if lacking.match(e["why"])}
    read = {name for name in schema.READ if name not in schema.FOR_NOTES and name not in ("icustays", "cxr_metadata")}
    wanted = dict.fromkeys({*read, "stays", "films"}, 1 if form == "numbers" else 3)
    wanted["d_icd_diagnoses"] = min(2, wanted["stays"])  # of which `?` may be a code
    assert {name: dropped.get(name) for name in wanted} == wanted
    rows = json.loads((tmp_path / "two/provenance.json").read_text())["rows_read"]
    first = json.loads((one / "provenance.json").read_text())["rows_read"]
    assert rows == {name: n + wanted["stays"] for name, n in first.items()}  # those of the files
    capsys.readouterr()
    assert check(config) == 0
    said = capsys.readouterr().out
    assert all(
        f"/{name}{suffix}: {wanted['stays']} rows dropped: no " in said
        for name in ("icustays", "chartevents", "triage", "pyxis")
    )


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_urls_give_the_same_features(tmp_path, with_films, protocol):
    import fsspec

    raw, one = with_films
    urls = {key: f"file://{raw}/{name}" for key, name in FOLDERS.items()}
    filesystem = fsspec.filesystem("memory")
    if protocol == "memory":
        for path in raw.rglob("*.csv*"):
            filesystem.pipe(f"/remote/{path.relative_to(raw)}", path.read_bytes())
        urls = {key: f"memory://remote/{name}" for key, name in FOLDERS.items()}
    tasks = (*ALL, "findings")
    same(one, build.build(FeaturesConfig(**urls, out=tmp_path / "two", memory="800MB", tasks=tasks)))
    if protocol == "memory":
        filesystem.rm("/remote", recursive=True)


def test_films_are_linked_again_only_when_what_they_depend_on_has_changed(tmp_path, with_films, monkeypatch):
    raw, one = with_films
    roots = {key: str(raw / name) for key, name in FOLDERS.items()}
    keys = roots | {"out": tmp_path / "two", "cache": one.with_name("features.cache"), "memory": "800MB"}
    monkeypatch.setattr(build.linking, "link_films", lambda *a, **k: pytest.fail("the films were linked again"))
    two = build.build(FeaturesConfig(**keys, tasks=["mortality"], seed=1))
    ours, theirs = (read_table(folder, "images").drop(columns="split") for folder in (one, two))
    pd.testing.assert_frame_equal(ours, theirs)
    told = [json.loads((folder / "attrition.json").read_text()) for folder in (one, two)]
    assert told[0]["counts"]["linking"] == told[1]["counts"]["linking"]
    linked = [[e for e in t["exclusions"] if e["table"].startswith("films")] for t in told]
    assert linked[0] == linked[1] and len(linked[0]) > 5
    with pytest.raises(pytest.fail.Exception, match="linked again"):
        build.build(FeaturesConfig(**keys | {"out": tmp_path / "three"}, ed_tolerance_hours=24))


def changed(mimic):
    """Change what tells a table's version, so that features are built again."""
    path = next(mimic.rglob("d_items.csv*"))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"seed": 1}, "  seed: 0 there, 1 now"),
        ({"preset": "medfuse"}, "  preset: 'default' there, 'medfuse' now"),
        ({"mimic_iv": "elsewhere"}, "  mimic_iv: .* there, 'elsewhere' now"),
    ],
)
def test_features_made_with_other_settings_are_not_overwritten(tmp_path, config, keys, says):
    out = tmp_path / "features"
    out.mkdir()
    (out / "provenance.json").write_text(json.dumps({"config": config(tasks=["mortality"]).model_dump(mode="json")}))
    with pytest.raises(UserError, match="holds features with other settings:\n" + says) as caught:
        build.build(config(**keys))
    assert str(caught.value).endswith("remove it, or choose another out=...")
    build.check_same(config(**keys, out=tmp_path / "other"))
    build.check_same(config(memory="2GB", threads=1, tasks=["phenotypes_early"]))


def test_a_users_own_table_of_samples_is_kept_when_features_are_built_again(mimic, config):
    out = build.build(config())
    own = pd.DataFrame({"subject_id": ["x"], "my_label": [1]})
    own.to_parquet(out / "samples/mine.parquet")
    changed(mimic)
    build.build(config())
    pd.testing.assert_frame_equal(pd.read_parquet(out / "samples/mine.parquet"), own)
    (out / "samples/mine.parquet").rename(out / "samples/decompensation.parquet")
    with pytest.raises(UserError, match=r"decompensation\.parquet: a table of your own with the name of a task"):
        build.build(config(tasks=["mortality", "decompensation"]))
    pd.testing.assert_frame_equal(pd.read_parquet(out / "samples/decompensation.parquet"), own)


def test_whatever_a_user_puts_into_samples_outlives_other_tables_a_refusal_and_a_kill(mimic, config, monkeypatch):
    out = build.build(config())
    own = {"mine.parquet": b"p", "mortality.csv": b"c", ".hidden": b"h", "more/deep/table.csv": b"d"}
    for name, content in own.items():
        (out / "samples" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "samples" / name).write_bytes(content)
    (out / "samples/link.parquet").symlink_to("../../elsewhere.parquet")

    def kept():
        names = {name: (out / "samples" / name).read_bytes() for name in own}
        return names == own and (out / "samples/link.parquet").is_symlink()

    changed(mimic)
    build.build(config())
    assert kept()
    (out / "samples/decompensation.parquet").write_bytes(b"x")
    opened = []
    monkeypatch.setattr(build, "open_source", lambda *a: opened.append(a))
    with pytest.raises(UserError, match=r"decompensation\.parquet: a table of your own"):
        build.build(config(tasks=["mortality", "decompensation"]))
    assert kept() and not opened  # refused before anything is read
    monkeypatch.undo()
    (out / "samples/decompensation.parquet").unlink()
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    out.rename(out.with_name(f".{out.name}.old{PARTIAL}-{process.pid}"))  # killed between the renames
    changed(mimic)
    build.build(config())
    assert kept() and not list(out.parent.glob(".*.old*"))


def test_an_edit_within_a_second_that_keeps_the_size_is_seen(tmp_path, frames, write, config):
    first = build.build(config(mimic_iv=str(write(tmp_path / "a", frames, suffix=".csv"))))
    before = series.load(first, normalise=False)
    path = tmp_path / "a/icu/chartevents.csv"
    stat, text = path.stat(), path.read_text()
    path.write_text(text.replace(",220045,", ",220046,", 1))  # an item that nobody reads
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    after = series.load(build.build(config(mimic_iv=str(tmp_path / "a"))), normalise=False)
    assert any(not np.array_equal(before[k], after[k]) for k in before)


def test_progress_says_how_much_is_done_and_how_long_it_will_take(monkeypatch, capsys):
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(events.time, "monotonic", lambda: float(next(clock)))

    class Done:
        left = 3

        def wait(self, _seconds):
            self.left -= 1
            return self.left < 0

    shares = iter([-1.0, 25.0, 90.0])  # DuckDB says -1 while it does not know
    events._watch(lambda: next(shares), "reading chartevents (once)", Done())
    said = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "reading chartevents (once):   0 %, 30 s",
        "reading chartevents (once):  25 %, 60 s, about 180 s left",
        "reading chartevents (once):  90 %, 90 s, about 10 s left",
    ]


def test_reading_is_measured_by_the_bytes_of_the_files(tmp_path):
    path = tmp_path / "chartevents.csv.gz"
    path.write_bytes(bytes(4_000_000))
    percent = events.reading(path)
    assert percent is not None and percent() < 10
    with path.open("rb") as file:
        file.read(2_000_000)
        assert 50 <= percent() < 60
        file.read()
    assert percent() == 100
    assert events.reading("gs://bucket/chartevents.csv.gz") is None


def test_binning_moves_from_the_counts_to_the_last_stay(mimic, config, monkeypatch):
    shown, begin = [], events.Stages.begin

    def noted(self, stage, percent):
        begin(self, stage, percent)
        shown.append(self())

    monkeypatch.setattr(events.Stages, "begin", noted)
    build.build(config())
    assert shown == sorted(shown) and shown[0] < 1 and shown[-1] == 100 and 33 <= shown[1] < 67


def test_a_second_run_reads_nothing_and_a_changed_config_only_what_depends_on_it(mimic, config, monkeypatch):
    out = build.build(config())
    written = (out / "provenance.json").stat().st_mtime_ns
    monkeypatch.setattr(events, "_write", lambda *a: pytest.fail("an event table was read again"))
    build.build(config(memory="900MB"))
    assert (out / "provenance.json").stat().st_mtime_ns == written
    monkeypatch.setattr(bins, "extract", lambda *a: pytest.fail("the series were binned again"))
    config = partial(config, cache=out.with_name("features.cache"), landmark_hours=24)
    out = build.build(config(seed=1, out=out.with_name("two")))
    assert set(read_table(out, "samples/mortality").predict_at_hours) == {24.0}
    monkeypatch.undo()
    monkeypatch.setattr(events, "_write", lambda *a: pytest.fail("an event table was read again"))
    out = build.build(config(step_hours=2, out=out.with_name("three")))
    assert json.loads((out / "series.json").read_text())["step_hours"] == 2


def test_changed_events_are_read_again(mimic, frames, write, config):
    out = build.build(config())
    before = series.load(out, normalise=False)
    frames["chartevents"]["valuenum"] += 1
    write(mimic, {"chartevents": frames["chartevents"]})
    after = series.load(build.build(config()), normalise=False)
    assert any(not np.array_equal(before[k], after[k]) for k in before)


def test_sixty_hours_of_series_hold_nothing_from_later(tmp_path, frames, write, config):
    """Changing events after hour 48 leaves the first 48 hours unchanged."""
    root = write(tmp_path / "a", frames)
    one = series.load(build.build(config(mimic_iv=str(root), out=tmp_path / "fa")), hours=48, normalise=False)
    chart = frames["chartevents"].merge(frames["icustays"][["stay_id", "intime"]], on="stay_id")
    late = chart.charttime >= chart.intime + pd.Timedelta(hours=48)
    frames["chartevents"].loc[late.to_numpy(), "valuenum"] = 61.0
    known = frames["labevents"].merge(frames["icustays"][["subject_id", "intime"]], on="subject_id")
    later = known.storetime >= known.intime + pd.Timedelta(hours=48)
    frames["labevents"].loc[later.to_numpy(), "valuenum"] = 99.0
    root = write(tmp_path / "b", frames)
    two = series.load(build.build(config(mimic_iv=str(root), out=tmp_path / "fb")), hours=48, normalise=False)
    assert late.any() and later.any()
    for stay in one:
        np.testing.assert_array_equal(one[stay], two[stay])


def test_events_binned_in_shares_give_the_same_series(mimic, config, monkeypatch):
    whole, shares, extract = build.build(config()), [], bins.extract
    monkeypatch.setattr(file, "EVENTS_A_MB", 0.01)
    monkeypatch.setattr(bins, "extract", lambda *given: shares.append(given) or extract(*given))
    parts = build.build(config(out=whole.with_name("parts"), cache=whole.with_name("parts.cache")))
    assert len(shares) > 3
    for name in ("series.safetensors", "series.json", "attrition.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_a_truncated_event_table_leaves_no_features(mimic, config):
    path = mimic / "icu/chartevents.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"chartevents\.csv\.gz: .*[Dd]ownload it again"):
        build.build(config())
    assert not config().out.exists() and not list(config().cache_folder.glob("chartevents*"))


@pytest.mark.parametrize(
    "memory, wanted",
    [
        ("300MB", "500MB or more"),
        ("0.4GB", "500MB or more"),
        ("99999999TB", "1000TB or less"),
        ("4", "a number and a unit, such as 4GB"),
        ("4 gigabytes", "a number and a unit, such as 4GB"),
    ],
)
def test_a_limit_of_memory_that_cannot_hold_is_refused(config, memory, wanted):
    with pytest.raises(UserError, match=f"`memory` is {wanted}.*{memory}"):
        build.build(load(FeaturesConfig, {"mimic_iv": "x", "out": str(config().out), "memory": memory}))


def test_a_folder_of_something_else_is_not_overwritten(mimic, config):
    config().out.mkdir()
    (config().out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a features folder; it holds"):
        build.build(config())


def test_a_killed_run_leaves_nothing_that_looks_complete_and_the_next_one_goes_on(mimic, config, tmp_path):
    yaml = tmp_path / "c.yaml"
    yaml.write_text(f"mimic_iv: {mimic}\nout: {config().out}\nmemory: 800MB\n")
    command = [sys.executable, "-m", "ehr_features", "build", str(yaml)]
    for wait in (0.9, 1.4, 1.9):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not config().out.exists() or (config().out / "provenance.json").is_file()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and str(config().out) in done.stdout, done.stderr
    assert len(series.load(config().out)) == 8


def test_check_reports_tables_and_what_can_be_done(mimic, config, capsys):
    assert check(config()) == 0
    said = capsys.readouterr().out
    assert "layout" in said and "MIMIC-IV 2.2" in said and "films                 no: cxr_metadata absent" in said
    (mimic / "hosp/labevents.csv.gz").unlink()
    assert check(config()) == 2
    assert "series                no: labevents absent; nothing can be built" in capsys.readouterr().out


def test_check_says_what_each_later_step_can_do(mimic, config, capsys, tmp_path):
    films = pd.DataFrame([["a", 10_000_001, 50_000_001]], columns=["dicom_id", "subject_id", "study_id"])
    wanted = [c for c in schema.READ["cxr_metadata"].columns if c not in films]
    films = films.assign(**dict.fromkeys(wanted))
    (tmp_path / "cxr").mkdir()
    films.to_csv(tmp_path / "cxr/mimic-cxr-2.0.0-metadata.csv.gz", index=False)
    keys = {"mimic_cxr": str(tmp_path / "cxr")}
    assert check(config(**keys)) == 0
    said = capsys.readouterr().out
    assert "then pretrain         yes" in said and "then fuse             yes" in said
    assert "then probe            no: cxr_chexpert absent" in said and "films: 1 of 1 subjects; 1 of subjects" in said
    assert "then images           no: " in said and "has no folder files/" in said
    (tmp_path / "cxr/files").mkdir()
    assert check(config(**keys, split="official")) == 2  # no official split is there
    said = capsys.readouterr().out
    assert "then images           yes" in said and "split=official        no: cxr_split absent" in said
    assert check(config(**keys, tasks=["findings"])) == 2


def test_check_names_a_faulty_table_and_goes_on(mimic, frames, write, config, capsys):
    write(mimic, {"icustays": frames["icustays"].drop(columns="los")})
    assert check(config()) == 2
    said = capsys.readouterr().out
    assert "column `los` is missing" in said and "chartevents" in said


def test_config_faults_are_told_together():
    with pytest.raises(ValueError, match="defined for step_hours=1"):
        FeaturesConfig(mimic_iv="x", out="y", preset="medfuse", step_hours=2)
    with pytest.raises(ValueError, match="multiple of `step_hours`"):
        FeaturesConfig(mimic_iv="x", out="y", step_hours=5)
    with pytest.raises(ValueError, match="needs mimic_cxr"):
        FeaturesConfig(mimic_iv="x", out="y", tasks=["findings"])
    with pytest.raises(ValueError, match="such as 4GB"):
        FeaturesConfig(mimic_iv="x", out="y", memory="lots")


LONG_QUERY = """
import os, time
from configs.cli import guard
from ehr_features.raw.engine import connect, interruptible

con = connect("duckdb").con

class Swallows:
    def __del__(self):  # what is raised here is printed and dropped
        os.kill(os.getpid(), {number})
        time.sleep(0.01)

def run():
    with interruptible():
        {first}
        print("ready", flush=True)
        con.execute("SELECT sum(a.range * b.range) FROM range(10000000) a, range(1000000) b").fetchall()

raise SystemExit(guard(run, signals=True))
"""


@pytest.mark.parametrize("swallowed", [False, True], ids=["during the query", "just before, and dropped"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_long_query_with_its_own_exit_code(number, code, swallowed):
    program = LONG_QUERY.format(number=int(number), first="Swallows()" if swallowed else "")
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        if not swallowed:
            time.sleep(1)
            process.send_signal(number)
        try:
            assert process.wait(timeout=180) == code
        finally:
            process.kill()


def test_check_tells_about_how_many_rows_a_large_file_has(mimic, config, monkeypatch):
    source = open_source(config())
    monkeypatch.setattr("ehr_features.check.COUNTED", 10)
    size = (mimic / "icu/chartevents.csv.gz").stat().st_size
    exact = len(pd.read_csv(mimic / "icu/chartevents.csv.gz"))
    assert num_rows(source, "chartevents", size) == (round(exact, -3), False)


def test_half_written_files_of_dead_processes_are_removed_and_others_left(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".spill.partial-{gone.pid}").mkdir()
    for name in (f".chart.partial-{gone.pid}.parquet", f".lab.partial-{os.getpid()}.parquet", "series.json"):
        (tmp_path / name).touch()
    tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".lab.partial-{os.getpid()}.parquet", "series.json"]


def test_every_written_column_is_declared_with_its_availability(mimic, config):
    out = build.build(config(tasks=ALL))
    said = json.loads((out / "schema.json").read_text())
    for table, columns in said.items():
        for name, about in columns.items():
            assert about.keys() == {"type", "unit", "group", "available_at"}, (table, name)
            assert about["available_at"] in ("study", "admission", "discharge")
    assert said["stays"]["outtime"]["available_at"] == said["stays"]["los_hours"]["available_at"] == "discharge"
    for task in ALL:
        label = list(said[f"samples/{task}"].values())[len(schema.SAMPLES) :]
        assert label and all(about["available_at"] == "discharge" for about in label)


def test_a_user_s_channels_file_adds_its_variable_to_the_folder(mimic, frames, write, config, tmp_path):
    labs = frames["labevents"]
    frames["labevents"] = pd.concat([labs, labs.assign(itemid=50813, valuenum=3.5, value="3.5")])
    frames["d_labitems"] = pd.DataFrame({"itemid": [50931, 50813], "label": ["Glucose", "Lactate"], "fluid": "Blood"})
    write(mimic, frames)
    mine = tmp_path / "mine.yaml"
    entry = "\n  - {name: lactate, unit: mmol/L, range: [0.1, 30], normal: 1.5, items: {50813: as_is}}\n"
    mine.write_text(SHIPPED.read_text() + entry)
    before = build.build(config())
    assert "lactate" not in json.loads((before / "series.json").read_text())["columns"]
    out = build.build(config(channels=mine, out=tmp_path / "two"))
    columns = json.loads((out / "series.json").read_text())["columns"]
    got = series.load(out, normalise=False)[30_000_001]
    assert set(got[:, columns.index("lactate")]) == {1.5, 3.5}
    assert got[:, columns.index("mask->lactate")].sum() == 7  # stored at hours 7, 15, ... 55


def test_a_split_that_does_not_exist_is_named_before_the_tables_are_opened(tmp_path, config):
    with pytest.raises(UserError, match="did you mean official"):
        build.build(config(mimic_iv=str(tmp_path / "absent"), split="offical"))


def test_a_table_without_rows_is_a_warning(mimic, config):
    path = next(mimic.rglob("labevents.csv*"))
    pd.read_csv(path).head(0).to_csv(path, index=False)
    warnings = json.loads((build.build(config()) / "provenance.json").read_text())["warnings"]
    assert f"{path}: has a header and no rows" in warnings
