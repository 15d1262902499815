"""`python -m finetune COMMAND`: linear evaluation, ICU fusion, scores, reports. `--help` imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from configs import cli
from finetune.config import FuseConfig, ProbeConfig


def _probe(config: ProbeConfig, args: argparse.Namespace) -> None:
    from finetune.probe import probe

    probe(config, args)


def _fuse(config: FuseConfig, args: argparse.Namespace) -> None:
    from finetune.train import fuse

    fuse(config, args)


def _score(args: argparse.Namespace) -> None:
    from finetune.score import score

    score(args.labels, args.scores, groups=args.groups, samples=args.samples, seed=args.seed, out=args.out)


def _report(args: argparse.Namespace) -> None:
    from finetune.report import report

    print(f"reading {len(args.runs)} folders")
    out = report(args.runs, args.out, with_films=args.with_films, truth=args.truth)
    print(f"{out}\nopen it in a browser")
    if args.screenshot:
        from finetune.report_screenshot import screenshot

        print(screenshot(out, args.screenshot))


def _demo(args: argparse.Namespace) -> None:
    from finetune.demo import demo

    demo(Path(args.out), subjects=args.subjects, seed=args.seed, shuffled=args.shuffled)


def _runs(args: argparse.Namespace) -> None:
    from finetune.report_runs import show

    show(args.folder)


def main(argv: list[str] | None = None) -> None:
    """Parse, run, and leave with an exit code."""
    top, commands = cli.parser("finetune", "Evaluate a pretrained encoder, and fuse it with the record.")
    cli.config_command(
        commands,
        "probe",
        ProbeConfig,
        _probe,
        says="score an encoder on the findings of its films: linear, logistic, kNN",
        example="python -m finetune probe configs/probe_linear.yaml encoder=runs/vit/encoder out=runs/probe",
        distributed=True,
    )
    cli.config_command(
        commands,
        "fuse",
        FuseConfig,
        _fuse,
        says="train a model of the record and the film on an ICU task, and evaluate it",
        example="python -m finetune fuse configs/fuse_mortality.yaml encoder=runs/vit/encoder out=runs/medfuse",
        distributed=True,
    )
    score = commands.add_parser("score", help="metrics with intervals for any two arrays, ours or not")
    score.add_argument("labels", metavar="LABELS", help=".npy, .csv or .parquet: rows x labels of 0, 1 and empty")
    score.add_argument("scores", metavar="SCORES", help="the same rows and labels; probabilities, or any scores")
    score.add_argument("--groups", metavar="FILE", help="one subject for each row; intervals resample subjects")
    score.add_argument("--samples", type=int, default=1000, help="resamples; 0 for none (default 1000)")
    score.add_argument("--seed", type=int, default=0, help="of the resamples (default 0)")
    score.add_argument("--out", metavar="FILE.csv", help="also write the table there")
    score.set_defaults(run=_score)
    report = commands.add_parser("report", help="one HTML page for any set of runs")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or a folder that holds runs")
    report.add_argument("--out", metavar="FILE", default="report.html", help="default report.html")
    report.add_argument(
        "--with-films", action="store_true", help="show films too; such a page must not leave the house"
    )
    report.add_argument("--truth", metavar="FILE", help="truth.json of a synthetic hospital, if it was moved")
    report.add_argument("--screenshot", metavar="FILE.png", help="also draw the top of the page (needs Chromium)")
    report.set_defaults(run=_report)
    demo = commands.add_parser("demo", help="from raw synthetic tables to report.html, on two CPU cores")
    demo.add_argument(
        "out", metavar="OUT", nargs="?", default="demo", help="a new folder, or one to go on with (default demo)"
    )
    demo.add_argument("--subjects", type=int, default=800, help="of the synthetic hospital (default 800)")
    demo.add_argument("--seed", type=int, default=0, help="of the data and of the training (default 0)")
    demo.add_argument(
        "--shuffled", action="store_true", help="permute findings, codes and deaths: nothing can be learned"
    )
    demo.set_defaults(run=_demo)
    runs = commands.add_parser("runs", help="list the runs in a folder with their key numbers")
    runs.add_argument("folder", metavar="FOLDER", nargs="?", default="runs", help="default runs")
    runs.set_defaults(run=_runs)
    cli.main(top, argv)


if __name__ == "__main__":
    main()
