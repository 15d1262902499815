"""`python -m pretrain COMMAND`: pack films, pretrain, export. `--help` imports no torch."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take a while
    from configs.begin import begin

    begin()

import argparse
import re
from pathlib import Path

from configs import UserError, cli
from configs.commands import command_line
from pretrain.config import ImagesConfig, PretrainConfig


def _images(config: ImagesConfig, args: argparse.Namespace) -> None:
    from pretrain.store import pack

    part = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if part is None:
        raise UserError(f"--shard {args.shard}: wanted i/n, e.g. 1/4 on the first of four machines")
    out = pack(config, (int(part[1]), int(part[2])))
    if (out / "store.json").is_file():
        print(f"{out}\nnext: {command_line(*_after_images(config, out, str(getattr(args, 'config', ''))))}")
    else:
        print(f"{out}\nnext: the parts of --shard i/{part[2]} that are not packed yet")


def _after_images(config: ImagesConfig, out: Path, given: str) -> list[str]:
    """The command that the packed films are for: pretraining on a table of films, or on the features beside."""
    if config.mimic_cxr is None:
        is_table = str(config.films).removesuffix(".gz").endswith((".csv", ".parquet"))
        table = config.films if is_table else "my.csv"  # who is on the films, to be written
        more = {"layout": config.layout if config.layout != "csv" else None, "path": config.path}
        named = [f"films.{key}={value}" for key, value in more.items() if value is not None]
        return ["pretrain", "own_films/pretrain", f"films.table={table}", *named, f"store={out}"]
    places = [
        out.parent / "features",
        *sorted(out.parent.glob("*")),
        Path("features"),
        *sorted(Path("features").glob("*")),
    ]
    made = [place for place in places if (place / "images.parquet").is_file()]
    same = [place for place in made if _films_of(place) == config.mimic_cxr]
    features = next(iter([*same, *made]), Path("features"))
    name = "demo/pretrain_resnet" if given.startswith("demo/") else "pretrain_vit_small"
    return ["pretrain", name, f"features={features}", f"store={out}"]


def _films_of(features: Path) -> str | None:
    """The folder of films that a features folder was made with."""
    from ehr_features.typed import read_json
    from ehr_features.typed.shapes import Provenance

    path = features / "provenance.json"
    config: dict[str, str | None] = (read_json(path, Provenance).get("config") or {}) if path.is_file() else {}
    return config.get("mimic_cxr")


def _train(config: PretrainConfig, args: argparse.Namespace) -> None:
    from pretrain.run import is_main

    if args.estimate:
        from pretrain.estimate import estimate

        said = estimate(config, args)
        if is_main():
            print(said)
        return
    from pretrain.train import train

    folder = train(config, args)
    if is_main():
        words = [f"{key}={value}" for key, value in config.source.items()]
        words += [f"store={config.store}", f"encoder={folder}", f"out={folder}_probe"]
        of = "demo/" if str(args.config).startswith("demo/") else ""
        probe = f"{of}probe_linear" if config.features is not None else "own_films/probe"
        print(f"{folder / 'encoder'}\nnext: {command_line('probe', probe, *words)}")


def _export(args: argparse.Namespace) -> None:
    from pretrain.export import export, hub

    if args.push is not None:
        hub.check_name(args.push)
        hub.confirm(args.push, yes=args.yes_i_may)
    elif args.yes_i_may:
        raise UserError("--yes-i-may goes with --push ORG/NAME")
    given = {"in_chans": args.in_chans, "branch": args.branch, "form": args.format, "probe": args.probe}
    out = export(args.source, args.out, **given, name=args.push)
    where = f"{out}\n{hub.push(out, args.push, args.format)}" if args.push is not None else f"{out}"
    print(f"{where}\nnext: read {out / 'README.md'}: whether these weights may leave your institution")


def _knowledge(args: argparse.Namespace) -> None:
    from ehr_features.typed import read_json
    from pretrain.shapes import Knowledge
    from pretrain.text.knowledge import retrieve

    print(f"passages of {args.passages} nearest to each note of {args.notes}, by {args.text_encoder}")
    out = retrieve(args.notes, args.passages, args.text_encoder, top=args.top, threshold=args.threshold)
    about = read_json(out.with_suffix(".json"), Knowledge)
    print(
        f"  {about['passages']} passages, {about['passages_changed_by_filter']} changed and "
        f"{about['passages_emptied']} emptied by the leak filter ({about['filter']}), "
        f"{about['passages_truncated']} longer than the encoder reads\n"
        f"  {about['notes_with_passages']} of {about['notes']} notes have a passage of cosine {args.threshold} or more"
    )
    print(f"wrote {out}\nnext: read its columns passage_ids and scores; passages.parquet beside it has the texts")


def parser() -> argparse.ArgumentParser:
    top, commands = cli.parser("pretrain", "Pack chest films, and pretrain an encoder on them. No label is read.")
    images = cli.config_command(commands, "images", ImagesConfig, _images)
    images.add_argument("--shard", metavar="i/n", default="1/1", help="pack the i-th of n parts, on n machines at once")
    training = cli.config_command(commands, "pretrain", PretrainConfig, _train)
    training.add_argument(
        "--estimate", action="store_true", help="time some steps, say how long the run takes, and stop"
    )
    out = cli.command(commands, "export")
    out.add_argument("source", metavar="RUN", help="a run folder, or an encoder/")
    out.add_argument("out", metavar="OUT", help="a new folder")
    out.add_argument("--in-chans", type=int, choices=(1, 3), default=None, help="channels of its input")
    out.add_argument("--branch", choices=("target", "anchor"), help="moving average, or trained (default: encoder/)")
    out.add_argument("--format", choices=("timm", "transformers", "onnx", "torchscript"), default="timm")
    out.add_argument(
        "--probe", metavar="RUN", help="a probe's run, for the model card (default: the newest beside RUN)"
    )
    out.add_argument(
        "--push", metavar="ORG/NAME", help="send OUT to a private repository of the model hub, after a question"
    )
    out.add_argument(
        "--yes-i-may", action="store_true", help="in scripts: the data's terms allow you to share these weights"
    )
    out.set_defaults(run=_export)
    near = cli.command(commands, "knowledge")
    near.add_argument("notes", metavar="NOTES", help="a folder that `notes` wrote")
    near.add_argument("passages", metavar="PASSAGES", help="a folder of .txt, .md and .jsonl files")
    near.add_argument("--text-encoder", metavar="FOLDER", required=True, help="Hugging Face or sentence-transformers")
    near.add_argument("--top", type=int, default=3, help="largest number of passages per note (default 3)")
    near.add_argument("--threshold", type=float, default=0.3, help="lowest cosine of a passage (default 0.3)")
    near.set_defaults(run=_knowledge)
    return top


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, run the command, exit with its code."""
    cli.main(parser(), argv)


if __name__ == "__main__":
    main()
