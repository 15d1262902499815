"""Fill the disk under each command: it names the file and what is free, and the same command goes on with space.

    python -m tests.hardening.disk OUT [--shares 10 30 50 70 90] [--commands fuse embed ...] [--world FOLDER]

Input: an empty folder, and the right to mount a small tmpfs. Output: a Markdown table: what a command writes at most
(measured while it runs undisturbed), and what became of it with each share of that free: refused, with the file that
its message names, or done, where it can do without what did not fit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.amounts import amount
from tests.hardening import kills
from tests.hardening.places import make_world
from tests.hardening.rooms import WRITES, Command, Room, short

RESULT = ("**/*.parquet", "**/*.safetensors", "**/*.arrow", "**/results.json")


@contextmanager
def small_disk(place: Path, megabytes: int = 256) -> Iterator[Path]:
    """A tmpfs. Raises: PermissionError: it may not be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        raise PermissionError(f"{place}: may not mount a small tmpfs here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def free_bytes(disk: Path) -> int:
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize


def fill(disk: Path, free: int) -> Path:
    """A file that leaves so many bytes free."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        for _ in range((free_bytes(disk) - free) // 4096):  # a page of a tmpfs
            file.write(bytes(4096))
    return ballast


def refused(text: str, disk: Path, *, lines: int = 1) -> str:
    """The file that an error names, below the disk; what is wrong with the message else begins with `!`."""
    says = [line for line in text.splitlines() if "error:" in line]
    if "Traceback" in text or not 1 <= len(says) <= lines:
        return f"! {len(says)} lines of errors: {text[-300:]}"
    if not (named := re.search(rf"{re.escape(str(disk))}/([^\s:;,]+)", says[0])):
        return f"! no file is named: {says[0]}"
    if not re.search(r"[\d.,]+ (GB|MB|KB|bytes) are free", says[0]):
        return f"! no amount: {says[0]}"
    return named[1]


def undisturbed(here: Room, command: Command, disk: Path) -> tuple[int, Any]:
    """The most bytes that it takes on the disk, and its result."""
    before = least = free_bytes(disk)
    process, log = here.start(command)
    while process.is_alive():
        least = min(least, free_bytes(disk))
        time.sleep(0.002)
    code, text = here.end(process, log)
    assert code == 0, text
    return before - min(least, free_bytes(disk)), result(command)


def result(command: Command) -> dict[str, Any]:
    globs = () if command.out.suffix else RESULT
    return kills.result(kills.Command("", [], command.out, globs))


def torment(world: Path, disk: Path, logs: Path, name: str, shares: Sequence[int]) -> list[str]:
    """The cells of its row of the table."""

    def fresh() -> tuple[Room, Command]:
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        here = Room(world, disk, logs)
        return here, short(here, name)

    need, wanted = undisturbed(*fresh(), disk)
    cells = [amount(need)]
    for share in shares:
        here, command = fresh()
        ballast = fill(disk, need * share // 100)
        code, text = here.run(command)
        said = "done" if code == 0 else refused(text, disk, lines=2 if name == "grid" else 1)
        said = f"! exit code {code}: {text[-300:]}" if code not in (0, 2) else said
        if faults := kills.damaged(kills.Command(name, [], command.out, ())):
            said = f"! {faults[0]}"
        ballast.unlink()
        again, text = here.run(command) if code else (0, "")
        if again:
            said = f"! with space: exit code {again}: {text[-300:]}"
        elif odd := kills.differences(result(command), wanted):
            said = f"! {odd[0]}"
        cells.append(said)
    return cells


def main() -> None:
    parser = kills.command_line(__doc__)
    parser.add_argument("--shares", type=int, nargs="+", default=[10, 30, 50, 70, 90])
    parser.add_argument("--commands", nargs="+", metavar="NAME", default=[n for n in WRITES if n != "knowledge"])
    parser.add_argument("--world", type=Path, help="the small hospital of an earlier call")
    args = parser.parse_args()
    out = args.out.resolve()
    world = args.world.resolve() if args.world else make_world(out / "world")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    print(f"| command | it writes | {' | '.join(f'{share} %' for share in args.shares)} |")
    print(f"|---|---|{'---|' * len(args.shares)}", flush=True)
    for name in args.commands:
        with small_disk(out / "disk") as disk:
            cells = torment(world, disk, out / "logs", name, args.shares)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
