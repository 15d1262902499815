"""Write the files generated from the code: `./launch.sh python -m benchmarks.pages`.

These are the table of columns in docs/features.md (between `<!-- features -->` and `<!-- end -->`), docs/config.md, and
the JSON Schemas in configs/schemas/ that editors read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from configs import Settings
from configs.keys import json_schema, table
from ehr_features import schema
from ehr_features.config import FeaturesConfig, NotesConfig
from ehr_features.films.values import columns
from ehr_features.series.channels import read_variables
from ehr_features.static import READS
from finetune.config import FuseConfig, GridConfig, ProbeConfig
from pretrain.config import ImagesConfig, PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS: dict[str, type[Settings]] = {
    "features": FeaturesConfig,
    "notes": NotesConfig,
    "images": ImagesConfig,
    "pretrain": PretrainConfig,
    "probe": ProbeConfig,
    "fuse": FuseConfig,
    "grid": GridConfig,
}
CONFIG_PAGE = """# Keys of the configs

Each command reads a YAML file and `key=value` words on the command line, which replace keys of the file; dots lead into
sections (`encoder.arch=...`). `./launch.sh COMMAND --keys` prints these tables, `--print-config` the resolved config.
The shipped files in configs/ hold only what differs from the defaults here. An editor with a YAML language server
completes and checks keys by the first line of a file, e.g. `# yaml-language-server: $schema=schemas/probe.json`.
This page is written by `./launch.sh python -m benchmarks.pages` from the schemas in the code.
"""


def features_table() -> str:
    """Every column of images.parquet that a group or a report reads, with the time at which it is known."""
    groups = {column: [g for g, reads in READS.items() if column in reads] for column in schema.IMAGES}
    rows = ["| column | type | unit | known at | groups |", "|---" * 5 + "|"]
    for name, column in schema.IMAGES.items():
        used = ", ".join(groups[name]) or {"subgroup": "reporting only", "finding": "label"}.get(column.group, "")
        rows.append(f"| {name} | {column.type} | {column.unit} | {column.available_at} | {used} |")
    for variable in read_variables():
        (name, column), (hours, _) = columns([variable]).items()
        unit = f"{column.unit}; hours since"
        rows.append(f"| {name}, {hours} | {column.type} | {unit} | {column.available_at} | {column.group} |")
    return "\n".join(rows)


def fill(text: str, name: str, table: str) -> str:
    """Put a table between a page's marks. Raises: ValueError: the page has no such marks."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no <!-- {name} --> ... <!-- end --> in the page")
    return pattern.sub(lambda found: found[1] + table + "\n" + found[2], text)


def generated() -> dict[Path, str]:
    """Every generated file and its content."""
    features = ROOT / "docs/features.md"
    files = {features: fill(features.read_text(encoding="utf-8"), "features", features_table())}
    sections = [f"\n## {name}\n\n{config.__doc__}\n\n{table(config)}\n" for name, config in SCHEMAS.items()]
    files[ROOT / "docs/config.md"] = CONFIG_PAGE + "".join(sections)
    schemas: dict[str, dict[str, Any]] = {name: json_schema(config) for name, config in SCHEMAS.items()}
    preset = {key: value for key, value in schemas["pretrain"].items() if key != "required"}
    for name, content in {**schemas, "preset": preset}.items():
        files[ROOT / f"configs/schemas/{name}.json"] = json.dumps(content, indent=1) + "\n"
    return files


if __name__ == "__main__":
    (ROOT / "configs/schemas").mkdir(exist_ok=True)
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
