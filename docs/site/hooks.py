"""Hooks of mkdocs: pages from files outside docs/ (README, CHANGELOG, CONTRIBUTING) and from the notebooks, links out
of docs/ led to copies of their files, and pages that mkdocs.yml does not name put under `More`."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\"#\s]+)")


def as_page(notebook: Path) -> str:
    """A notebook as Markdown: its text, its code in fences."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    link = f"\n\n[The notebook itself](../checkout/docs/tutorials/{notebook.name})"
    return "\n\n".join(parts) + link + "\n"


def in_site(source: str, target: str) -> str:
    """Where a link leads: a file of the checkout's path, as the site's path. `source`: path of the page's file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith("docs/tutorials/") and path.endswith(".ipynb"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    return path.removeprefix("docs/") if path.startswith("docs/") else f"checkout/{path}"


def relink(text: str, source: str, page: str) -> tuple[str, set[str]]:
    """Lead a page's relative links to the site's paths; also the files of the checkout that it needs copied."""
    copies: set[str] = set()

    def new(found: re.Match[str]) -> str:
        if "://" in found[2] or found[2].startswith(("mailto:", "../checkout/")):
            return found[0]
        to = in_site(source, found[2])
        if to.startswith("checkout/"):
            copies.add(to.removeprefix("checkout/"))
        return found[1] + posixpath.relpath(to, posixpath.dirname(page) or ".")

    return LINK.sub(new, text), copies


def on_config(config: Any) -> Any:
    """Put the pages of docs/ that the navigation does not name at its end."""
    named = set(re.findall(r"[\w/]+\.md", json.dumps(config["nav"])))
    missing = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    if missing:
        config["nav"].append({"More": missing})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the copies that links need."""
    pages = {to: (name, (ROOT / name).read_text(encoding="utf-8")) for name, to in OUTSIDE.items()}
    for notebook in sorted((ROOT / "docs/tutorials").glob("*.ipynb")):
        name = f"docs/tutorials/{notebook.name}"
        pages[f"tutorials/{notebook.stem}.md"] = (name, as_page(notebook))
    copies = {f"docs/tutorials/{path.name}" for path in (ROOT / "docs/tutorials").glob("*.ipynb")}
    for path in (ROOT / "docs").glob("*.md"):
        pages[path.name] = (f"docs/{path.name}", path.read_text(encoding="utf-8"))
        if old := files.get_file_from_path(path.name):
            files.remove(old)
    for page, (source, text) in pages.items():
        content, needed = relink(text, source, page)
        copies |= needed
        files.append(File.generated(config, page, content=content))
    for name in sorted(copies):
        if (ROOT / name).is_file():
            files.append(File.generated(config, str(PurePosixPath("checkout") / name), abs_src_path=str(ROOT / name)))
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Take our worker.js where the plugin `offline` loads a script from elsewhere."""
    return re.sub(r'src="https://[^"]*iframe-worker[^"]*"', f'src="{_up(page.url)}site/worker.js"', output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The same in 404.html, which may be shown at any address."""
    return re.sub(r'<script src="https://[^"]*iframe-worker[^"]*"></script>', "", output_content)


def _up(url: str) -> str:
    return "../" * url.count("/")
