"""Damaged files of every kind are read or refused with a message; fuzz.py damages more of them."""

from pathlib import Path

import pytest

from tests.hardening import fuzz

KINDS = (
    "config",
    "raw table",
    "film",
    "store",
    "encoder/",
    "weights",
    "arrays",
    "channels",
    "notes.parquet",
    "results",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Path, fuzz.Reader]]]:
    return fuzz.kinds(tmp_path_factory.mktemp("fuzz") / "in")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_read_or_refused_with_a_message(files, kind: str) -> None:
    chosen = next(value for name, value in files.items() if name.startswith(kind))
    assert set(fuzz.torment(chosen, 12 if kind == "raw table" else 45, seed=1)) <= {"read", "refused"}


def test_every_kind_is_fuzzed(files) -> None:
    assert all(any(name.startswith(kind) for kind in KINDS) for name in files)


def test_another_exception_and_a_hang_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"whole")

    def fails(path: Path) -> None:
        raise KeyError("x")

    def hangs(path: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    assert "KeyError" in fuzz.attempt(path, fails, b"") and "TimeoutError" in fuzz.attempt(path, hangs, b"")
    assert path.read_bytes() == b"whole"
