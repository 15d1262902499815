"""Files of a cache that list in their header what they hold: what is missing is made by all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ehr_features.files import digest
from ehr_features.progress import Bar
from pretrain.run.processes import agreed, divide

Places = dict[str, tuple[Path, int]]  # name -> file and number in it


def complete(
    cache: Path,
    start: str,
    names: Sequence[str],
    size: int,
    make: Callable[[list[str], Path, Bar], None],
    what: str,
    unit: str,
    whole: Callable[[Path], bool] = lambda path: True,
) -> Places:
    """Where each name is: in files that were there, or that are made now, each by one process.

    All processes of a run call it, with the same arguments; another call with more names makes the new ones alone.

    Args:
        start: of the files' names; changes with all that the content depends on but the names.
        names: distinct. size: names in a file, which a stopped process loses.
        make: writes these names, in this order, to the file, with `header(names)`, and counts them.
        what, unit: of the bar. whole: whether a file's content can be used; else it counts as absent.
    """
    found = agreed(lambda: _known(cache, start, set(names), whole))
    missing = [name for name in names if name not in found]
    parts = [missing[i : i + size] for i in range(0, len(missing), size)]
    paths = [cache / f"{start}_{digest(part)}.safetensors" for part in parts]

    def one(number: int, bar: Bar) -> None:
        make(parts[number], paths[number], bar)

    divide(paths, one, what, unit, [len(part) for part in parts], lambda path: False)
    return found | {name: (path, i) for path, part in zip(paths, parts, strict=True) for i, name in enumerate(part)}


def header(names: Sequence[str]) -> dict[str, str]:
    """The header of a file with these names, none of which has a line break."""
    return {"names": "\n".join(names)}


def _known(cache: Path, start: str, wanted: set[str], whole: Callable[[Path], bool]) -> Places:
    found: Places = {}
    for path in sorted(cache.glob(f"{start}_*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                own = {name: (path, i) for i, name in enumerate(file.metadata()["names"].split("\n"))}
            if own.keys() & wanted - found.keys() and whole(path):
                found |= {name: at for name, at in own.items() if name in wanted}
        except (SafetensorError, OSError, KeyError, TypeError):
            continue
    return found
