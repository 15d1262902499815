"""python -m ehr_features COMMAND: raw MIMIC tables -> features/."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take a while
    from configs.begin import begin

    begin()

import argparse
import sys
from pathlib import Path
from typing import Any

from configs import cli
from configs.commands import command_line
from ehr_features.config import FeaturesConfig, NotesConfig, limit
from ehr_features.demo.plan import add_arguments as demo_arguments


def _build(config: Any, args: argparse.Namespace) -> int:
    from ehr_features.build import build
    from ehr_features.films.summary import summary
    from ehr_features.raw.engine import interruptible

    print(f"features: {config.mimic_iv} (preset {config.preset}) -> {config.out}", file=sys.stderr, flush=True)
    with interruptible():
        out = build(config)
    print("\n".join(summary(out)))
    print(out)
    of = "demo/" if str(args.config).startswith("demo/") else ""
    fuse = ["fuse", f"{of}fuse_mortality", f"features={out}", "model=record_lstm", "encoder=null", "store=null"]
    images = ["images", f"{of}images", f"mimic_cxr={config.mimic_cxr}", f"out={out.parent / 'store'}"]
    print(f"next: {command_line(*(images if config.mimic_cxr else fuse))}")
    return 0


def _check(config: Any, args: argparse.Namespace) -> int:
    from ehr_features.check import check
    from ehr_features.raw.engine import interruptible

    with interruptible():
        code = check(config)
    if code == 0:
        print(f"next: {command_line('features', args.config, *args.overrides)}")
    return code


def _notes(config: Any, args: argparse.Namespace) -> int:
    from ehr_features.notes.write import write_notes
    from ehr_features.raw.engine import interruptible

    print(f"notes: {config.features} (filter {config.filter}) -> {config.out}", file=sys.stderr, flush=True)
    with interruptible():
        out = write_notes(config)
    print(out)
    print(f"next: {command_line('audit', config.features, out)}")
    return 0


def _demo(args: argparse.Namespace) -> int | None:
    from ehr_features.demo.generate import run

    return run(args)


def _audit(args: argparse.Namespace) -> int:
    from ehr_features.audit.claims import run
    from ehr_features.raw.engine import interruptible

    with interruptible():
        return run(args)


def parser() -> argparse.ArgumentParser:
    top, commands = cli.parser("ehr_features", "Raw MIMIC tables -> features/")
    cli.config_command(commands, "features", FeaturesConfig, _build)
    cli.config_command(commands, "check", FeaturesConfig, _check)
    cli.config_command(commands, "notes", NotesConfig, _notes)
    audit = cli.command(commands, "audit")
    audit.add_argument("features", metavar="FEATURES", type=Path, help="a features/ folder, or one of notes")
    audit.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="runs, or notes, made from it")
    audit.add_argument(
        "--memory", type=_limit, help="memory limit of the engine, such as 4GB; that of the build if not given"
    )
    audit.set_defaults(run=_audit)
    hospital = cli.command(commands, "hospital")
    demo_arguments(hospital)
    hospital.set_defaults(run=_demo)
    return top


def _limit(text: str) -> str:
    try:
        return limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: memory {error}") from None


def main() -> None:
    cli.main(parser())


if __name__ == "__main__":
    main()
