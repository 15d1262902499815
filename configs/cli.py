"""What the three command lines share: `CONFIG [key=value ...]` commands, exit codes, one-line errors.

Exit codes: 0 done; 2 the user's mistake; 75 stopped early (SIGTERM, SIGHUP, a process that does not answer), the same
command goes on; 130 Ctrl-C; 1 ours.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from configs import launch
from configs.amounts import amount, free_beside
from configs.commands import COMMANDS, DISTRIBUTED, NAMES, command_line
from configs.loader import Settings, UserError, load
from configs.signals import INTERRUPTED, STOPPED, Stopped, ignore, listen

ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "the file is larger than is allowed here (ulimit -f): raise that, or choose another out=...",
    errno.EACCES: "permission denied: choose another folder with out=...",
    errno.EPERM: "that is not permitted: choose another folder with out=...",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOENT: "no longer there; was it moved or deleted under the command? Put it back, and run the command again",
    errno.EROFS: "the file system is read-only: choose another folder with out=...",
}


def parser(prog: str, says: str) -> tuple[argparse.ArgumentParser, Any]:
    """A command line with subcommands; fill the second value with `config_command` or `command`."""
    more = f"`python -m {prog} COMMAND --help` shows a command's options and an example."
    top = argparse.ArgumentParser(prog=f"python -m {prog}", description=says, epilog=more, allow_abbrev=False)
    return top, top.add_subparsers(dest="command", required=True, metavar="COMMAND")


def command(commands: Any, name: str) -> argparse.ArgumentParser:
    """Add a command of `configs.commands`; it takes no config unless `config_command` adds one."""
    row, start = COMMANDS[name], command_line(name)
    made: argparse.ArgumentParser = commands.add_parser(
        row.subcommand,
        prog=start,
        help=row.does,
        description=row.does,
        epilog=f"example:\n  {start} {row.example}",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    made.set_defaults(parser=made)
    return made


class Keys(argparse.Action):
    """Print the keys of a schema and stop, as --help does."""

    def __init__(self, schema: type[Settings], **options: Any) -> None:
        super().__init__(**options, nargs=0)
        self.schema = schema

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from configs.keys import show

        print(show(self.schema))
        parser.exit()


def config_command(
    commands: Any,
    name: str,
    schema: type[Settings],
    run: Callable[[Any, argparse.Namespace], int | None],
) -> argparse.ArgumentParser:
    """Add `NAME CONFIG [key=value ...] [--print-config]`; `run(config, args)` does the work."""
    made = command(commands, name)
    made.usage = "%(prog)s [options] CONFIG [key=value ...]"
    made.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a key of the YAML, e.g. seed=1")
    made.add_argument("--keys", action=Keys, schema=schema, help="print every key: type, default, meaning; and stop")
    made.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    if name in DISTRIBUTED:
        launch.add_flags(made)

    def go(args: argparse.Namespace) -> int | None:
        config = load(schema, args.config, args.overrides)
        if args.print_config:
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        try:
            return run(config, args)
        except OSError as error:
            if error.filename is None:
                error.filename = getattr(config, "out", None)
            raise

    made.set_defaults(run=go)
    return made


def main(top: argparse.ArgumentParser, argv: list[str] | None = None) -> NoReturn:
    """Parse, run, and leave with the exit code that the outcome asks for."""

    def run() -> int | None:
        args, rest = top.parse_known_args(argv)
        overrides = [word for word in rest if "=" in word and not word.startswith("-")]
        if hasattr(args, "overrides") and len(overrides) == len(rest):
            args.overrides = [*args.overrides, *rest]  # argparse does not mix flags and trailing words
        elif rest:
            top.error(_not_understood([word for word in rest if word not in overrides], args))
        code: int | None = args.run(args)
        return code

    sys.exit(guard(run, signals=True))


def _not_understood(words: list[str], args: argparse.Namespace) -> str:
    """Name the words, and what was probably meant by the first flag among them."""
    says, flag = f"not understood: {' '.join(words)}", next((w for w in words if w.startswith("--")), "")
    name = flag.partition("=")[0]
    if near := difflib.get_close_matches(name, re.findall(r"--[a-z-]+", args.parser.format_help()), n=1):
        return f"{says}; did you mean {near[0]}?"
    if flag and hasattr(args, "overrides"):
        return f"{says}; keys of the config are given as key=value, without dashes"
    return says


def guard(run: Callable[[], int | None], *, signals: bool = False) -> int:
    """Run, and turn what went wrong into an exit code and a message of a few lines."""
    if signals:
        listen()
    try:
        message, code = "", run() or 0
        _flush()
    except UserError as error:
        message, code = str(error), 2
    except Stopped as stopped:
        says = str(stopped) or "stopped by SIGTERM"
        message, code = says if "go on with" in says else f"{says}; go on with\n  {typed()}", STOPPED
    except KeyboardInterrupt:
        message, code = "interrupted; nothing half-written is left looking complete", INTERRUPTED
    except BrokenPipeError:
        message, code = "", 0  # `... | head` closed the pipe
        _no_output()
    except RuntimeError as error:
        if not launch.between_processes(error):
            raise
        message, code = "", launch.lost(error)
    except OSError as error:
        if (advice := ADVICE.get(error.errno or 0)) is None:
            raise
        message, code = f"{error.filename or 'writing'}: {advice}{_free(error)}", 2
    if signals:
        ignore()
    return _say(message, code) if message else code


def _flush() -> None:
    """Notice here, not when Python ends, that a reader has left; what the command found out stays its exit code."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _no_output()


def _no_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _free(error: OSError) -> str:
    """How much the disk of the file has free, if it is full."""
    free = free_beside(error.filename) if error.errno == errno.ENOSPC and error.filename else None
    return "" if free is None else f" ({amount(free)} are free)"


def typed() -> str:
    """The command that started this process, as a user would type it."""
    start, words = Path(sys.argv[0]), sys.argv[1:]
    if start.name == "__main__.py" and words and (name := NAMES.get((start.parent.name, words[0]))):
        return command_line(name, *words[1:])
    module = ["python", "-m", start.parent.name] if start.name == "__main__.py" else [start.as_posix()]
    return shlex.join([*module, *words])


def _say(message: str, code: int) -> int:
    """Print the message once a run: the first process speaks; another does if the first did not fail as well."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        if code != 2:
            return code
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends the others once one has left
        time.sleep(2)
        message = f"(process {rank}) {message}"
    print(f"error: {message}" if code == 2 else message, file=sys.stderr, flush=True)
    return code
