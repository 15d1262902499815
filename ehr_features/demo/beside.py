"""Find truth.json of the synthetic hospital that features/ were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import UserError
from ehr_features.files import read_json


def truth_of(features: str | Path) -> dict[str, Any]:
    """truth.json beside the tables that features/ were made from, {} for real data.

    A path in provenance.json that is not absolute is looked for from each folder above features/.
    """
    features = Path(features).resolve()
    made = features / "provenance.json"
    said = read_json(made) if made.is_file() else {}
    config = said.get("config") if isinstance(said, dict) else None
    if not isinstance(config, dict):
        return {}
    for tables in (config.get(key) for key in ("mimic_iv", "mimic_cxr") if config.get(key)):
        beside = Path(str(tables)).parent / "truth.json"
        for path in (beside, *(parent / beside for parent in features.parents)):
            if path.is_file():
                found = read_json(path)
                if not isinstance(found, dict):
                    raise UserError(f"{path}: wanted a JSON object, found a {type(found).__name__}")
                return found
    return {}
