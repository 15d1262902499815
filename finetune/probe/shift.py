"""Distribution shift: a probe trained on one subgroup and tested on another (AP -> PA, early -> late years).

Input: a `Learner` and a subgroup field. Output: rows of results.json (subset `view: AP -> PA`), and two paired
differences with intervals over the same resampled subjects. `comparison`: on the target's test films, training on the
source against training on the target. `drop`: for the source's probe, the two sides' test films. A probe that relies on
a shortcut of the source (a marker, a device, a view) is lower in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from configs import UserError
from ehr_features.schema import SPLITS
from finetune.compare import paired
from finetune.labelled import Films
from finetune.probe.evaluation import difference, fields, reached, score, scored
from finetune.probe.methods import Learner, Rows

if TYPE_CHECKING:
    from finetune.config import ProbeConfig, ShiftConfig


def shift(config: ProbeConfig, films: Films, learn: Learner) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Fit on each side, test across.

    Returns: rows of the test split, and {field, source, target, drop, comparison: rows of `compare.paired`}.
    Raises: UserError: no such field or group, or a side without train, val or test films.
    """
    assert config.shift is not None
    values, source, target = sides(config.shift, films)
    rows = {
        (side, split): films.rows(split)[np.isin(values[films.rows(split)], groups)]
        for side, groups in (("source", source), ("target", target))
        for split in SPLITS
    }
    for (side, split), found in rows.items():
        if not len(found):
            groups = source if side == "source" else target
            raise UserError(f"shift: no {split} film with {config.shift.field} {', '.join(groups)}")
    names = {"source": "+".join(source), "target": "+".join(target)}
    fitted = {
        side: [learn(rows[side, "train"], rows[side, "val"], seed) for seed in config.every_seed] for side in names
    }
    tables, on = [], {}
    for trained, tested in (("source", "source"), ("source", "target"), ("target", "target")):
        test: Rows = rows[tested, "test"]
        logits = np.stack([fit.predict(test) for fit in fitted[trained]])
        on[trained, tested] = scored(films, test, logits, unit=config.unit)
        table = score(
            on[trained, tested], samples=config.samples, seed=config.seed, reasons=fitted[trained][0].unlearned
        )
        tables.append(table.assign(split="test", subset=f"{config.shift.field}: {names[trained]} -> {names[tested]}"))
    across, home = on["source", "target"], on["target", "target"]
    table = paired(
        across.labels,
        across.runs,
        home.runs,
        same_seeds=True,
        groups=across.table["subject_id"].to_numpy(),
        names=films.names,
        samples=config.samples,
        seed=config.seed,
    )
    records = table.astype(object).where(table.notna(), None).to_dict("records")
    says: dict[str, Any] = {"field": config.shift.field, "source": source, "target": target, "comparison": records}
    says["drop"] = difference(*reached([on["source", "source"], across], samples=config.samples, seed=config.seed))
    return pd.concat(tables, ignore_index=True), says


def sides(config: ShiftConfig, films: Films) -> tuple[np.ndarray, list[str], list[str]]:
    """Each film's group, and the groups of source and target. Raises: UserError."""
    have = fields(films.table)
    if not config.field:
        raise UserError(f"shift.field is missing: which groups? one of {', '.join(have) or 'none'}")
    if config.field not in have:
        raise UserError(f"shift: no field `{config.field}` here; there are {', '.join(have) or 'none'}")
    values = have[config.field].astype(object).where(have[config.field].notna(), "").astype(str).to_numpy()
    counts = pd.Series(values[values != ""]).value_counts()
    groups = sorted(counts.index)
    if config.field == "view" and not config.source:
        source = ["AP"]
    elif config.field == "year_group" and not config.source:
        source = groups[: len(groups) // 2]
    else:
        source = list(config.source) or [str(counts.index[0])]
    default = ["PA"] if config.field == "view" and source == ["AP"] else [g for g in groups if g not in source]
    target = list(config.target) or default
    if unknown := [g for g in (*source, *target) if g not in groups]:
        raise UserError(f"shift: no film has {config.field} {unknown[0]}; there are {', '.join(groups)}")
    if not target or set(source) & set(target):
        raise UserError(f"shift: source {source} and target {target} of {config.field} must differ; it has {groups}")
    return values, source, target


def in_a_line(says: dict[str, Any]) -> str:
    """The comparison in one line."""
    macro = says["comparison"][0]
    ends = f"{'+'.join(says['source'])} -> {'+'.join(says['target'])}"
    if macro["difference"] is None:
        return f"{says['field']} {ends}: no label has both classes"
    line = (
        f"{says['field']} {ends}: AUROC {macro['a']:.3f}, trained on the target itself {macro['b']:.3f}; difference "
        f"{macro['difference']:+.3f} ({macro['low']:+.3f} to {macro['high']:+.3f}, p {macro['p']:.3f})"
    )
    if drop := says["drop"]:
        line += (
            f"; from {drop['a']:.3f} on the source itself it falls by {drop['difference']:.3f} "
            f"({drop['low']:.3f} to {drop['high']:.3f})"
        )
    return line
