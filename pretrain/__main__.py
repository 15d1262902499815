"""`python -m pretrain COMMAND`: pack films, pretrain, export. `--help` imports no torch."""

from __future__ import annotations

import argparse
import re

from configs import UserError, cli
from pretrain.config import ImagesConfig, PretrainConfig


def _images(config: ImagesConfig, args: argparse.Namespace) -> None:
    from pretrain.pack import pack

    part = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if part is None:
        raise UserError(f"--shard {args.shard}: wanted i/n, e.g. 1/4 on the first of four machines")
    out = pack(config, (int(part[1]), int(part[2])))
    print(f"{out}\nnext: ./launch.sh pretrain configs/pretrain_vit_small.yaml features=features store={out}")


def _train(config: PretrainConfig, args: argparse.Namespace) -> None:
    from pretrain.run import is_main
    from pretrain.train import train

    folder = train(config, args)
    if is_main():
        print(f"{folder / 'encoder'}\nnext: ./launch.sh probe configs/probe_linear.yaml encoder={folder}")


def _export(args: argparse.Namespace) -> None:
    from pretrain.export import export

    out = export(args.source, args.out, in_chans=args.in_chans, branch=args.branch, form=args.format, probe=args.probe)
    print(f"{out}\nnext: read {out / 'MODEL_CARD.md'}: whether these weights may leave your institution")


def main(argv: list[str] | None = None) -> None:
    """Parse, run, and leave with an exit code."""
    top, commands = cli.parser("pretrain", "Pack chest films, and pretrain an encoder on them. No label is read.")
    images = cli.config_command(
        commands,
        "images",
        ImagesConfig,
        _images,
        says="films (JPEG, PNG, DICOM) -> store/",
        example="python -m pretrain images configs/images.yaml mimic_cxr=/data/mimic-cxr-jpg out=store",
    )
    images.add_argument("--shard", metavar="i/n", default="1/1", help="pack the i-th of n parts, on n machines at once")
    cli.config_command(
        commands,
        "train",
        PretrainConfig,
        _train,
        says="features/ + store/ -> runs/X/ with encoder/",
        example="python -m pretrain train configs/pretrain_vit_tiny.yaml features=features store=store out=runs/msn",
        distributed=True,
    )
    out = cli.command(
        commands,
        "export",
        says="runs/X/ -> an encoder for use elsewhere",
        example="python -m pretrain export runs/msn exported --probe runs/probe",
    )
    out.add_argument("source", metavar="RUN", help="a run folder, or an encoder/")
    out.add_argument("out", metavar="OUT", help="a new folder")
    out.add_argument("--in-chans", type=int, choices=(1, 3), default=None, help="of the films it will see")
    out.add_argument("--branch", choices=("target", "anchor"), default="target", help="moving average, or trained")
    out.add_argument("--format", choices=("timm", "onnx"), default="timm")
    out.add_argument("--probe", metavar="RUN", default=None, help="a probe's run folder, for the model card")
    out.set_defaults(run=_export)
    cli.main(top, argv)


if __name__ == "__main__":
    main()
