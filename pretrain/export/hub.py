"""`export --push ORG/NAME`: send an exported encoder to a model hub, after a typed statement about the data's terms.

Input: the folder that `export` wrote. Output: a private repository with the files of its form and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from configs import UserError
from pretrain.export.formats import HUB_FILES

BESIDE = ("README.md", "encoder.json")  # sent with the files of every form
TERMS = (
    "The data use agreements of MIMIC (PhysioNet) and of many public films forbid sharing the data, and weights may\n"
    "carry traces of patients. Whoever pushes them answers for it."
)


def check_name(name: str) -> None:
    """Raises: UserError: not of the form ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error}") from None
    if "/" not in name:
        raise UserError(f"--push {name}: wanted ORG/NAME, e.g. my-lab/{name}")


def confirm(name: str, *, yes: bool) -> None:
    """Ask for a sentence to be typed, or accept --yes-i-may.

    Raises: UserError: another text was typed, or there is no terminal to ask at; nothing has been sent then.
    """
    if yes:
        return
    wanted = f"I may share {name}"
    if not sys.stdin.isatty():
        raise UserError(
            f"--push {name}: nothing was sent, because there is no terminal to ask at. {TERMS}\nIf you may share them, "
            "add --yes-i-may"
        )
    print(f"{TERMS}\nIf the terms of your data allow it, type: {wanted}")
    try:
        typed = input("> ")
    except EOFError:
        typed = ""
    if typed.strip() != wanted:
        raise UserError(f"--push {name}: nothing was sent: typed {typed!r}, wanted {wanted!r}")


def push(folder: Path, name: str, form: str, api: Any = None) -> str:
    """Send the files of a form, README.md and encoder.json; the repository is made private if there is none.

    Args:
        api: a `huggingface_hub.HfApi`; None: that of the user's login.
    Returns: its address. Raises: UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    files = [file for file in (*BESIDE, *HUB_FILES[form]) if (folder / file).is_file()]
    api = HfApi() if api is None else api
    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]  # the one that the hub uses
    failed: tuple[type[Exception], ...] = (HfHubHTTPError, OSError, ValueError, *(c.HTTPError for c in clients))
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, commit_message=f"Export of {folder.name}"
        )
    except failed as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--push {name}: the hub did not take it: {why}. {folder} is complete; push it again") from None
    print(f"sent {', '.join(files)} to the repository {name} (private if it is new)")
    return f"{getattr(api, 'endpoint', '')}/{name}"
