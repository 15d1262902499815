"""Headless Chromium for tests of pages: console messages, requests, and positions of figures."""

from __future__ import annotations

import html as markup
import json
import re
import subprocess
from pathlib import Path

from finetune.report.screenshot import FLAGS, browser

REQUEST = re.compile(r'"initiator":"([^"]+)".*?"url":"([^"]+)"')
MEASURE = """<script>
const drawn = "svg, img, ol.flow, ul.bars, .scroll, summary";
const seen = [...document.querySelectorAll("figure, .card")].map(f => {
  const boxes = [...f.querySelectorAll(drawn)].map(e => e.getBoundingClientRect());
  const shown = boxes.filter(b => b.width > 100 && b.height > 15);
  return {id: f.id, drawn: shown.length, right: Math.max(0, ...shown.map(b => b.right)), height: f.offsetHeight,
          marks: f.querySelectorAll("svg .mark, svg .line, .bar i, td, img").length};
});
const cut = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()), box = e.getBoundingClientRect();
  if (!own || !box.width || e.closest("details:not([open]) > :not(summary), title, style, pre, .scroll")) continue;
  const frame = (e.closest(".tile, figure, main") || document.body).getBoundingClientRect();
  const over = !e.closest("svg") && e.clientWidth && e.scrollWidth > e.clientWidth + 1;
  if (over || box.right > frame.right + 1 || box.left < frame.left - 1 || e.textContent.includes("…"))
    cut.push(e.textContent.slice(0, 60));
}
for (const e of document.querySelectorAll(".scroll"))
  if (!e.closest("details") && e.scrollWidth > e.clientWidth + 1) cut.push("table: " + e.textContent.slice(0, 60));
const out = parent.document.createElement("pre");
out.id = "measured";
out.textContent = JSON.stringify({figures: seen, cut, width: innerWidth, wide: document.documentElement.scrollWidth});
parent.document.body.append(out);
</script>"""


def visit(page: Path, profile: Path, width: int) -> tuple[str, list[str], list[str]]:
    """The page's final markup, its console messages, and its requests to other addresses."""
    log = profile / "net.json"
    profile.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900", f"--log-net-log={log}"]
    flags += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    done = subprocess.run(
        [str(browser()), *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    text = log.read_text(encoding="utf-8", errors="replace")
    asked = {url for who, url in REQUEST.findall(text) if who != "not an origin"}  # that is Chromium's own
    return done.stdout, console, sorted(asked)


def measure(page: Path, profile: Path, width: int) -> dict:
    """Sizes of all figures at a window's width. The page's policy forbids scripts, so a copy without it is measured."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    inside = markup.escape(text.replace("</body>", f"{MEASURE}</body>"))
    copy = profile.with_suffix(".html")  # a frame, since a window cannot be as narrow as a phone
    copy.write_text(f'<body><iframe srcdoc="{inside}" width="{width}" height="900" frameborder="0"></iframe></body>')
    dom, _, _ = visit(copy, profile, width + 100)
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.S)
    assert found, "the measuring script did not run"
    return json.loads(markup.unescape(found[1]))
