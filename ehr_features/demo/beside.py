"""Find truth.json of the synthetic hospital that features/ were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ehr_features.typed import read_json, shapes


def truth_of(features: str | Path) -> dict[str, Any]:
    """truth.json beside the tables that features/ were made from, {} for real data.

    A path in provenance.json that is not absolute is looked for from each folder above features/.
    """
    features = Path(features).resolve()
    made = features / "provenance.json"
    config = (read_json(made, shapes.Provenance).get("config") or {}) if made.is_file() else {}
    for tables in (config.get(key) for key in ("mimic_iv", "mimic_cxr") if config.get(key)):
        beside = Path(str(tables)).parent / "truth.json"
        for path in (beside, *(parent / beside for parent in features.parents)):
            if path.is_file():
                found: dict[str, Any] = read_json(path, shapes.Truth)
                return found
    return {}
