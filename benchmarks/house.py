"""Measure the house and fill the generated tables of the pages.

    python -m benchmarks.house            prints the measures of the code, and writes the tables between the pages'
                                          `<!-- NAME -->` and `<!-- end -->` marks (features, house)

Comes in: the repository. Goes out: docs/features.md and CONTRIBUTING.md, brought up to date.
"""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass
from pathlib import Path

from ehr_features import schema
from ehr_features.static import READS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configs", "ehr_features", "pretrain", "finetune", "benchmarks", "tests")


@dataclass(frozen=True)
class Function:
    """A function or method of the house."""

    path: Path
    name: str
    lines: int
    public: bool
    documented: bool
    typed: bool


def functions(path: Path) -> list[Function]:
    """All functions and methods of a file, but not those inside functions."""
    found: list[Function] = []

    def visit(body: list[ast.stmt], private: bool, of_class: bool) -> None:
        for node in body:
            hidden = private or getattr(node, "name", "_").startswith("_")
            if isinstance(node, ast.ClassDef):
                visit(node.body, hidden, True)
            elif isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                typed = node.returns is not None and all(
                    a.annotation is not None for a in arguments[int(of_class) and not _is_static(node) :]
                )
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                documented = ast.get_docstring(node) is not None
                found.append(Function(path, node.name, lines, not hidden, documented, typed))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, False, False)
    return found


def _is_static(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)


def house_table() -> str:
    """Lines, longest file, longest function, docstring and type coverage, by room."""
    rows = [
        "| room | files | lines | longest file | longest function | public with docstring | typed |",
        "|---" * 7 + "|",
    ]
    for room in ROOMS:
        files = sorted((ROOT / room).rglob("*.py"))
        lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
        all_of_them = [f for path in files for f in functions(path)]
        public = [f for f in all_of_them if f.public]
        longest, long_file = max(all_of_them, key=lambda f: f.lines), max(lines, key=lambda path: lines[path])
        documented = f"{100 * sum(f.documented for f in public) / len(public):.0f}%" if room != "tests" else ""
        typed = f"{100 * sum(f.typed for f in all_of_them) / len(all_of_them):.0f}%"
        rows.append(
            f"| {room} | {len(files)} | {sum(lines.values()):,} | {long_file.name} ({lines[long_file]}) "
            f"| {longest.name} ({longest.lines}) | {documented} | {typed} |"
        )
    return "\n".join(rows)


def features_table() -> str:
    """Every column of images.parquet that a group or a report reads, with the moment from which it is known."""
    groups = {column: [g for g, reads in READS.items() if column in reads] for column in schema.IMAGES}
    rows = ["| column | type | unit | known at | groups |", "|---" * 5 + "|"]
    for name, column in schema.IMAGES.items():
        used = ", ".join(groups[name]) or {"subgroup": "reporting only", "finding": "label"}.get(column.group, "")
        rows.append(f"| {name} | {column.type} | {column.unit} | {column.available_at} | {used} |")
    return "\n".join(rows)


GENERATED = {("docs/features.md", "features"): features_table, ("CONTRIBUTING.md", "house"): house_table}


def fill(text: str, name: str, table: str) -> str:
    """Put a table between a page's marks. Raises: ValueError: the page has no such marks."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no <!-- {name} --> ... <!-- end --> in the page")
    return pattern.sub(lambda found: found[1] + table + "\n" + found[2], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for (page, name), make in GENERATED.items():
        path = ROOT / page
        path.write_text(fill(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")
        print(f"{page}: {name}")
    print(house_table())


if __name__ == "__main__":
    main()
