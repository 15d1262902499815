"""A picture of a report, for the README: `ehr-msn report RUN ... --screenshot FILE.png`.

Needs Chromium (Debian: apt install chromium) or Chrome. The page is opened from disk; nothing is loaded.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from configs import UserError
from ehr_features.files import new_file

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def browser() -> str | None:
    """Chromium or Chrome, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def screenshot(page: str | Path, out: str | Path, *, width: int = 1280, height: int = 1500) -> Path:
    """Draw the top of a page.

    Args:
        width, height: of the window, in pixels; the picture has that size.
    Raises: UserError: no browser, or it drew nothing.
    """
    program = browser()
    if program is None:
        raise UserError("no Chromium found for the screenshot; on Debian: apt install chromium")
    with tempfile.TemporaryDirectory() as profile, new_file(out) as part:
        where = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={part}"]
        command = [program, *FLAGS, *where, Path(page).resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not part.is_file():
            raise UserError(f"{program} drew no picture (exit code {done.returncode}): {done.stderr.strip()[-300:]}")
    return Path(out)
