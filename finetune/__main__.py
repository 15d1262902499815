"""`python -m finetune COMMAND`: linear evaluation, ICU fusion, scores, reports. `--help` imports no torch."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take a while
    from configs.begin import begin

    begin()

import argparse
from pathlib import Path
from typing import Any

from configs import UserError, cli
from ehr_features.schema import HELD_OUT
from finetune.config import FuseConfig, GridConfig, ProbeConfig


def _probe(config: ProbeConfig, args: argparse.Namespace) -> None:
    if args.shift:
        given = config.model_dump()
        config = ProbeConfig.model_validate(given | {"shift": (given["shift"] or {}) | {"field": args.shift}})
    if args.watch:
        from finetune.probe.watch import watch

        watch(config, args.watch)
        return
    from finetune.probe.main import probe

    probe(config, args)


def _fuse(config: FuseConfig, args: argparse.Namespace) -> None:
    from finetune.fusion.train import fuse

    fuse(config, args)


def _grid(config: GridConfig, args: argparse.Namespace) -> int:
    from finetune.grid import grid

    return grid(config, shard=args.shard, only=args.only, dry_run=args.dry_run, processes=args.processes)


def _score(args: argparse.Namespace) -> None:
    from finetune.score import score

    score(args.labels, args.scores, groups=args.groups, samples=args.samples, seed=args.seed, out=args.out)


def _compare(args: argparse.Namespace) -> None:
    from finetune.compare import show, show_against

    if args.table:
        if len(args.a) != 1 or len(args.b or ()) > 1:
            raise UserError("compare --table: wanted one grid's folder, and with --with one of its methods")
        baseline = args.b[0] if args.b else None
        show_against(args.a[0], baseline, split=args.split, samples=args.samples, seed=args.seed, out=args.out)
        return
    if not args.b:
        raise UserError("compare: --with RUN is missing: the runs of the other method")
    show(args.a, args.b, split=args.split, samples=args.samples, seed=args.seed, out=args.out)


def _embed(args: argparse.Namespace) -> None:
    from finetune.embed import embed

    embed(args.encoder, args.films, args.out, pool=args.pool)


def _nearest(args: argparse.Namespace) -> None:
    from finetune.embed import nearest

    nearest(args.embeddings, args.film, number=args.number, encoder=args.encoder)


def _report(args: argparse.Namespace) -> None:
    from finetune.report.page import report

    print(f"reading {len(args.runs)} folders")
    out = report(args.runs, args.out, with_films=args.with_films, truth=args.truth)
    print(f"{out}\nopen it in a browser")
    if args.screenshot:
        from finetune.report.screenshot import screenshot

        print(screenshot(out, args.screenshot))


def _demo(args: argparse.Namespace) -> None:
    from finetune.demo import demo

    demo(Path(args.out), subjects=args.subjects, seed=args.seed, shuffled=args.shuffled)


def _runs(args: argparse.Namespace) -> None:
    from finetune.report.runs import show

    show(args.folder, out=args.out)


def _count(text: str) -> int:
    """Parse an argument as a whole number from 0 to 2**32 - 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is {'below 0' if number < 0 else 'above 4,294,967,295'}")
    return number


def _resamples(text: str) -> int:
    """Parse a number of resamples, as `samples` of a config."""
    if (number := _count(text)) > 100_000:
        raise argparse.ArgumentTypeError(f"{number} is above 100,000")
    return number


def _trains(commands: Any) -> None:
    """Commands with a config that write a run: probe, fuse, grid."""
    probe = cli.config_command(commands, "probe", ProbeConfig, _probe)
    probe.add_argument("--shift", metavar="FIELD", help="also train on some groups, test on others: view, year_group")
    probe.add_argument("--watch", metavar="RUN", help="follow a pretraining: probe each encoder that it exports")
    cli.config_command(commands, "fuse", FuseConfig, _fuse)
    grid = cli.config_command(commands, "grid", GridConfig, _grid)
    grid.add_argument("--shard", default="1/1", metavar="I/N", help="this machine's part of the combinations")
    grid.add_argument("--only", default="*", metavar="PATTERN", help="of the combinations' names")
    grid.add_argument("--dry-run", action="store_true", help="print the commands that are not done yet, and stop")
    grid.add_argument("--processes", type=int, default=1, metavar="N", help="of each run, one a GPU")


def _scores(commands: Any) -> None:
    """Commands on predictions: score, compare."""
    score = cli.command(commands, "score")
    score.add_argument("labels", metavar="LABELS", help=".npy, .csv or .parquet: rows x labels of 0, 1 and empty")
    score.add_argument("scores", metavar="SCORES", help="the same rows and labels; probabilities, or any scores")
    score.add_argument("--groups", metavar="FILE", help="one subject for each row; intervals resample subjects")
    score.add_argument("--samples", type=_resamples, default=1000, help="resamples; 0 for none (default 1000)")
    score.add_argument("--seed", type=_count, default=0, help="of the resamples (default 0)")
    score.add_argument("--out", metavar="FILE.csv", help="also write the table there")
    score.set_defaults(run=_score)
    compare = cli.command(commands, "compare")
    compare.add_argument("a", metavar="RUN", nargs="+", help="runs of one method, or with --table a grid")
    compare.add_argument("--with", dest="b", metavar="RUN", nargs="+", help="runs of the other method")
    compare.add_argument("--table", action="store_true", help="each method of a grid against --with NAME, one of them")
    compare.add_argument("--split", default="test", choices=HELD_OUT)
    compare.add_argument("--samples", type=_resamples, default=1000, help="resamples (default 1000)")
    compare.add_argument("--seed", type=_count, default=0, help="of the resamples (default 0)")
    compare.add_argument("--out", metavar="FILE", help="also write the table there: .csv, .md or .tex (LaTeX)")
    compare.set_defaults(run=_compare)


def _films(commands: Any) -> None:
    """Commands on any films with an encoder alone: embed, nearest."""
    embed = cli.command(commands, "embed")
    embed.add_argument(
        "encoder", metavar="ENCODER", help="encoder/, a run that has one, or a published encoder, as in probe"
    )
    embed.add_argument("films", metavar="FILMS", help="a folder, a list (.txt, .csv with a column path), or one film")
    embed.add_argument("out", metavar="OUT.parquet")
    embed.add_argument("--pool", choices=("cls", "avg", "map", "max", "stages"), help="default: the encoder's own")
    embed.set_defaults(run=_embed)
    nearest = cli.command(commands, "nearest")
    nearest.add_argument("embeddings", metavar="EMBEDDINGS.parquet", help="what `embed` wrote")
    says = "an id or path in it, or another film's file; default: the first film in it"
    nearest.add_argument("film", metavar="FILM", nargs="?", help=says)
    nearest.add_argument("--number", type=_count, default=10, help="how many (default 10)")
    nearest.add_argument("--encoder", help="in place of the one that EMBEDDINGS names")
    nearest.set_defaults(run=_nearest)


def _shows(commands: Any) -> None:
    """Commands that show results: report, runs, demo."""
    report = cli.command(commands, "report")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or a folder that holds runs")
    report.add_argument("--out", metavar="FILE", default="report.html", help="default report.html")
    report.add_argument("--with-films", action="store_true", help="show films too; such a page must not be passed on")
    report.add_argument("--truth", metavar="FILE", help="truth.json of a synthetic hospital, if it was moved")
    report.add_argument("--screenshot", metavar="FILE.png", help="also draw the top of the page (needs Chromium)")
    report.set_defaults(run=_report)
    runs = cli.command(commands, "runs")
    runs.add_argument("folder", metavar="FOLDER", nargs="?", default="runs", help="default runs")
    runs.add_argument("--out", metavar="FILE", help="also write the table there: .csv, .md or .tex (LaTeX)")
    runs.set_defaults(run=_runs)
    demo = cli.command(commands, "demo")
    demo.add_argument(
        "out", metavar="OUT", nargs="?", default="demo", help="a new folder, or one to go on with (default demo)"
    )
    demo.add_argument(
        "--subjects",
        type=int,
        default=2400,
        help="of the synthetic hospital (default 2400); pretraining takes as long with fewer",
    )
    demo.add_argument("--seed", type=_count, default=0, help="of the data and of the training (default 0)")
    demo.add_argument(
        "--shuffled", action="store_true", help="permute findings, codes and deaths: nothing can be learned"
    )
    demo.set_defaults(run=_demo)


def parser() -> argparse.ArgumentParser:
    top, commands = cli.parser("finetune", "Evaluate a pretrained encoder, and fuse it with the record.")
    for add in (_trains, _scores, _films, _shows):
        add(commands)
    return top


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, run the command, exit with its code."""
    cli.main(parser(), argv)


if __name__ == "__main__":
    main()
