"""`ehr-msn COMMAND ...` and `python -m configs COMMAND ...`: start a command, in as many processes as are asked for."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import shutil
import sys
from collections.abc import Collection
from typing import NoReturn

from configs.begin import begin
from configs.commands import COMMANDS, DISTRIBUTED, OF_LAUNCH_SH, PROGRAM, program, usage


def script() -> NoReturn:
    """The console script `ehr-msn`."""
    found = shutil.which("ehr-msn")
    on_path = found is not None and os.path.realpath(found) == os.path.realpath(sys.argv[0])
    os.environ[PROGRAM] = "ehr-msn" if on_path else sys.argv[0]
    start()


def start() -> NoReturn:
    """Print the help, or run a command, and leave with its exit code."""
    begin()
    name, *words = sys.argv[1:] or ["help"]
    if name in ("help", "-h", "--help"):
        for word in words[:1]:
            _check(word, [*COMMANDS, *OF_LAUNCH_SH, "--completion"])
        with contextlib.suppress(BrokenPipeError):  # `... | head`
            print(usage(), flush=True)
            sys.exit()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit()
    if name == "--completion":
        sys.exit(_completion("".join(words)))
    _check(name, COMMANDS)
    if name == "features" and words[:1] in (["check"], ["audit"], ["notes"]):
        name, *words = words
    if name in DISTRIBUTED and (code := _processes(name, words)) is not None:
        sys.exit(code)
    command = COMMANDS[name]
    sys.argv = [f"{command.module}/__main__.py", command.subcommand, *words]  # as `python -m` has it
    importlib.import_module(f"{command.module}.__main__").main()
    sys.exit()


def _check(name: str, names: Collection[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"{usage()}\n\nerror: unknown command '{name}'{hint}", file=sys.stderr)
        sys.exit(2)


def _processes(name: str, words: list[str]) -> int | None:
    """The exit code of a run of several processes; None: it is to run in this one."""
    from configs import UserError, launch

    try:
        return launch.start(name, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command `config`."""
    from configs import cli

    top, commands = cli.parser("configs", "The shipped configs.")
    made = cli.command(commands, "config")
    made.add_argument("name", metavar="NAME", nargs="?", help="one of the list")
    made.set_defaults(run=_show)
    return top


def main() -> NoReturn:
    from configs import cli

    cli.main(parser())


def _completion(shell: str) -> int:
    """Print the script for tab completion."""
    from configs import cli, completion

    return cli.guard(lambda: print(completion.script(shell), end=""))


def _show(args: argparse.Namespace) -> None:
    from configs import UserError, shipped

    if args.name is None:
        for name, path in shipped.names().items():
            print(f"{name:32} {shipped.title(path)}")
    elif args.name in shipped.names():
        print(
            shipped.names()[args.name].read_text(encoding="utf-8").replace("./launch.sh", program() or "ehr-msn"),
            end="",
        )
    else:
        raise UserError(f"{args.name}: no such shipped config{shipped.hint(args.name)}")


if __name__ == "__main__":
    start()
