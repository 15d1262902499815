"""What the three command lines share: `CONFIG [key=value ...]` commands, exit codes, one-line errors.

Exit codes: 0 done; 2 the user's mistake; 75 stopped early, the same command goes on (SIGTERM); 130 Ctrl-C; 1 ours.
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

from configs.loader import Settings, UserError, load
from configs.signals import INTERRUPTED, STOPPED, Stopped, ignore, listen

ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "the file is larger than is allowed here (ulimit -f): raise that, or choose another out=...",
    errno.EACCES: "permission denied: choose another folder with out=...",
    errno.EPERM: "that is not permitted: choose another folder with out=...",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EROFS: "the file system is read-only: choose another folder with out=...",
}
LAUNCHED = {("ehr_features", "build"): "features", ("pretrain", "train"): "pretrain"}  # the names of ./launch.sh
LAUNCHED |= {("ehr_features", name): name for name in ("check", "audit", "notes")}
LAUNCHED |= {("pretrain", name): name for name in ("images", "export")}
LAUNCHED |= {("finetune", name): name for name in ("demo", "probe", "fuse", "grid", "report", "runs", "embed")}


def parser(prog: str, says: str) -> tuple[argparse.ArgumentParser, Any]:
    """A command line with subcommands; fill the second value with `config_command` or `command`."""
    more = f"`python -m {prog} COMMAND --help` shows a command's options and an example."
    top = argparse.ArgumentParser(prog=f"python -m {prog}", description=says, epilog=more, allow_abbrev=False)
    return top, top.add_subparsers(dest="command", required=True, metavar="COMMAND")


def command(commands: Any, name: str, *, says: str, example: str) -> argparse.ArgumentParser:
    """Add a command with its worked example; it takes no config unless `config_command` adds one."""
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=says,
        description=says,
        epilog=f"example:\n  {example}",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    made.set_defaults(parser=made)
    return made


def config_command(
    commands: Any,
    name: str,
    schema: type[Settings],
    run: Callable[[Any, argparse.Namespace], int | None],
    *,
    says: str,
    example: str,
    distributed: bool = False,
) -> argparse.ArgumentParser:
    """Add `NAME CONFIG [key=value ...] [--print-config]`; `run(config, args)` does the work.

    Args:
        distributed: also take --processes, --machines, --machine-rank, --main-address (the launcher passes them on, and
            the run compares them with the world size that it finds).
    """
    made = command(commands, name, says=says, example=example)
    made.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. of configs/")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a key of the YAML, e.g. seed=1")
    made.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    if distributed:
        made.add_argument("--processes", type=int, default=None, metavar="N", help="processes on each machine")
        made.add_argument("--machines", type=int, default=None, metavar="M", help="number of machines")
        made.add_argument("--machine-rank", type=int, default=None, metavar="I", help="this machine, from 0")
        made.add_argument("--main-address", default=None, metavar="A", help="host[:port] of machine 0")
        made.add_argument("--accelerate-config", default=None, metavar="FILE", help="an accelerate config file")

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
    args, rest = top.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if hasattr(args, "overrides") and len(overrides) == len(rest):
        args.overrides = [*args.overrides, *rest]  # argparse does not mix flags and trailing words
    elif rest:
        top.error(_not_understood([word for word in rest if word not in overrides], args))
    sys.exit(guard(lambda: args.run(args), signals=True))


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
    except UserError as error:
        message, code = str(error), 2
    except Stopped as stopped:
        says = str(stopped) or "stopped by SIGTERM"
        message, code = says if "go on with" in says else f"{says}; go on with\n  {typed()}", STOPPED
    except KeyboardInterrupt:
        message, code = "interrupted; nothing half-written is left looking complete", INTERRUPTED
    except BrokenPipeError:
        message, code = "", 0  # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if (advice := ADVICE.get(error.errno or 0)) is None:
            raise
        message, code = f"{error.filename or 'writing'}: {advice}", 2
    if signals:
        ignore()
    return _say(message, code) if message else code


def typed() -> str:
    """The command that started this process, as a user would type it."""
    start, words = Path(sys.argv[0]), sys.argv[1:]
    key = (start.parent.name, words[0] if words else "")
    if start.name == "__main__.py" and key in LAUNCHED:
        return shlex.join(["./launch.sh", LAUNCHED[key], *words[1:]])
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
