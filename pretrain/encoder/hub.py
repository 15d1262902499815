"""A hub's repository in the local cache, and what model cards list of the training films.

Input: ORG/NAME; weights or their folder. Output: the cached folder; a part of a sentence for the check of subjects.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from configs import UserError
from ehr_features.typed import read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # in the order of preference
BESIDE = ("preprocessor_config.json", "README.md")  # read if they are there
RAD_DINO = "microsoft/rad-dino"
PUBLISHED = {"rad-dino": "MIMIC-CXR", "chexfound": "MIMIC-CXR"}  # training films named by the authors' papers
MIMIC = re.compile(r"\bMIMIC\b[-_ ]?(?:CXR|IV|III|II)?|(?i:\bmimic[-_ ]?(?:cxr|iv|iii)\b)")


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it describes the network, bring it too")
    found: dict[str, Any] = read_json(path)
    return found


def fetch(spec: str, repo: str, weights: tuple[str, ...] = WEIGHTS, *, config: bool = True) -> Path:
    """The folder of the local cache with a repository's config, weights and card, downloaded if they are not there.

    The cache is Hugging Face's (HF_HOME); HF_ENDPOINT and HF_HUB_OFFLINE apply. A cached file is used as it is.
    Raises: UserError: neither in the cache nor reachable, or no such repository or file.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    name, _, revision = repo.partition("@")
    files = ["config.json", weights[0], *BESIDE] if config else [weights[0]]
    mend = (
        f"where the machine is online, fetch {', '.join(files)} of {name} into a folder, bring it here, and give "
        + ("its path instead" if config else f"its path with weights.arch={spec.partition(':')[2]} (its {weights[0]})")
    )

    def one(file: str, needed: bool) -> Path | None:
        ask = partial(hub.hf_hub_download, name, file, revision=revision or None, etag_timeout=5)
        try:
            with suppress(errors.LocalEntryNotFoundError):
                return Path(ask(local_files_only=True))
            if not _reachable(hub.constants.ENDPOINT, hub.constants.HF_HUB_OFFLINE):
                raise errors.LocalEntryNotFoundError(file)
            return Path(ask())
        except errors.HFValidationError:
            raise UserError(f"{spec}: `{name}` is not ORG/NAME of the hub") from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise UserError(
                f"{spec}: the hub has no repository {repo}, or it is private or gated (`hf auth login`); or {mend}"
            ) from None
        except errors.LocalEntryNotFoundError:
            if not needed:
                return None
            lacks = weights[0] if file in weights else file
            raise UserError(
                f"{spec}: {lacks} is not in the local cache and the hub cannot be reached; {mend}"
            ) from None
        except errors.EntryNotFoundError:
            if not needed:
                return None
            raise UserError(f"{spec}: {name} has no {file}; wanted {' or '.join(weights)} and config.json") from None
        except OSError as error:  # a proxy, a full disk, a connection that breaks
            raise UserError(f"{spec}: {file} cannot be fetched ({str(error).splitlines()[0]}); {mend}") from None

    if config:
        one("config.json", needed=True)
    got = None
    for i, file in enumerate(weights):
        got = got or one(file, needed=i == len(weights) - 1)
    assert got is not None
    if got.name.endswith(".index.json"):
        for part in sorted(set(read_config(got)["weight_map"].values())):
            one(part, needed=True)
    for file in BESIDE:
        one(file, needed=False)
    return got.parent


def _reachable(endpoint: str, offline: bool) -> bool:
    """Whether the hub answers at all: without this, its client tries for half a minute."""
    if offline:
        return False
    address = urlsplit(endpoint)
    if getproxies().get(address.scheme):
        return True  # the proxy decides
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def card_note(path: str | Path, spec: str = "") -> str:
    """What the model card beside weights, their name, or their authors list of MIMIC; empty if nothing.

    Args:
        path: the weights file or its folder. spec: as the user named it.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    for name in ("README.md", "MODEL_CARD.md"):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            head = text.split("\n---", 1)[0] if text.startswith("---") else ""  # YAML: datasets, tags, name
            found = re.search(r"\bmimic[\w-]*", head, re.IGNORECASE) or MIMIC.search(text)
            if found:
                return f"its model card {name} lists {found[0]}"
    scheme = spec.partition(":")[0]
    if scheme in PUBLISHED or RAD_DINO in spec:
        return f"its authors list {PUBLISHED.get(scheme, 'MIMIC-CXR')} among its training films"
    if "mimic" in path.name.lower() or "mimic" in spec.lower():
        return f"its name, {spec or path.name}, contains MIMIC"
    return ""
