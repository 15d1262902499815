"""The files that other programs read: citation, container, conda, pre-commit, public CI, issue templates."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import configs

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTRUCTIONS = {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN"}
INSTRUCTIONS |= {"SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def dockerfile() -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def ignored(name: str) -> bool:
    """Whether the last matching line of .dockerignore leaves a name at the top out of the build."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split():
        if fnmatch.fnmatch(name, line.removeprefix("!")):
            out = not line.startswith("!")
    return out


def test_the_dockerfile_has_known_instructions_and_starts_from_its_base() -> None:
    words = [word for word, _ in dockerfile()]
    assert set(words) <= INSTRUCTIONS
    assert words[:2] == ["ARG", "FROM"] and words[-2:] == ["ENTRYPOINT", "CMD"]
    given = dict(dockerfile())
    assert given["FROM"] == "${BASE}" and "/" not in given["ENTRYPOINT"]
    assert given["ENTRYPOINT"] == '["ehr-msn"]' and "ehr-msn" in PROJECT["project"]["scripts"]


def test_the_dockerfile_copies_all_that_pip_needs_and_nothing_that_is_left_out() -> None:
    sources = {name for word, rest in dockerfile() if word == "COPY" for name in rest.split()[:-1]}
    for name in sources:
        assert (ROOT / name).exists(), f"Dockerfile: COPY {name}, which is not in the checkout"
        assert not ignored(name), f".dockerignore leaves out {name}"
    packages = {name.removesuffix("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert sources == packages | {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert ignored("demo") and ignored(".venv") and ignored("work")


def test_the_container_runs_as_a_user_without_rights() -> None:
    users = [rest for word, rest in dockerfile() if word == "USER"]
    assert users and users[-1] not in ("root", "0")


def test_citation_changelog_and_package_have_one_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == configs.__version__ and cited["license"] == PROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^## (\d+\.\d+\.\d+)", log)[0] == configs.__version__


def test_conda_takes_the_python_and_the_checkout() -> None:
    found = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (pip,) = [item["pip"] for item in found if isinstance(item, dict)]
    assert f"python{PROJECT['project']['requires-python']}" in found and "pip" in found
    extras = {name for line in pip for name in re.findall(r"\[(\w+)\]", line)}
    assert all(line.startswith("-e .") for line in pip) and extras <= set(PROJECT["project"]["optional-dependencies"])


def test_the_hooks_of_pre_commit_are_programs_of_the_extra_dev() -> None:
    pytest.importorskip("codespell_lib", reason="extra dev")
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repo["hooks"]:
        python, flag, module, *_ = hook["entry"].split()
        assert (repo["repo"], hook["language"], python, flag) == ("local", "system", "python", "-m")
        assert importlib.util.find_spec(module), module


def test_public_ci_calls_the_readmes_test_command_and_builds_the_docs() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    steps = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert steps["test"] == ["./launch.sh test"]
    install, build = steps["docs"]
    assert re.findall(r'"(.+?)"', install) == PROJECT["project"]["optional-dependencies"]["docs"]
    assert build.removeprefix("python -m ") in (ROOT / "Makefile").read_text(encoding="utf-8")
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert oldest in jobs["test"]["strategy"]["matrix"]["python"]


@pytest.mark.parametrize("path", [path for path in TEMPLATES if path.stem != "config"], ids=lambda p: p.stem)
def test_an_issue_template_is_a_form(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["body"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "checkboxes", "dropdown")
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]
