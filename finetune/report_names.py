"""Names of labels and metrics for a reader: phenotypes, bins of the length of stay, means over labels."""

from __future__ import annotations

from types import MappingProxyType

# Source: AHRQ's single-level CCS, shortened.
PHENOTYPES = MappingProxyType(
    {
        2: "Septicemia",
        49: "Diabetes without complication",
        50: "Diabetes with complications",
        53: "Disorders of lipid metabolism",
        55: "Fluid and electrolyte disorders",
        98: "Essential hypertension",
        99: "Hypertension with complications",
        100: "Acute myocardial infarction",
        101: "Coronary atherosclerosis",
        105: "Conduction disorders",
        106: "Cardiac dysrhythmias",
        108: "Congestive heart failure",
        109: "Acute cerebrovascular disease",
        122: "Pneumonia",
        127: "COPD and bronchiectasis",
        130: "Pleurisy, pneumothorax, collapse",
        131: "Respiratory failure",
        133: "Other lower respiratory disease",
        134: "Other upper respiratory disease",
        151: "Other liver diseases",
        153: "Gastrointestinal hemorrhage",
        157: "Acute renal failure",
        158: "Chronic kidney disease",
        238: "Complications of procedures",
        249: "Shock",
    }
)
STAYS = ("under 1 day", *(f"{day} to {day + 1} days" for day in range(1, 8)), "8 to 14 days", "14 days or more")
METRICS = MappingProxyType(
    {
        "f1": "F1",
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "brier": "Brier score",
        "sensitivity_at_specificity_90": "sensitivity at 90% specificity",
        "kappa": "kappa (linear weights)",
        "mae_hours": "mean absolute error, hours",
        "r2": "R²",
    }
)


def told(label: str) -> str:
    """A label for a reader; one that is unknown keeps its words."""
    kind, _, number = label.rpartition("_")
    if label == "macro" or label.startswith("macro "):
        of = label.removeprefix("macro").strip()
        return f"Mean, {of}" if of else "Mean (macro)"
    if kind == "phenotype" and number.isdecimal() and int(number) in PHENOTYPES:
        return PHENOTYPES[int(number)]
    if kind == "los_bin" and number.isdecimal() and int(number) < len(STAYS):
        return STAYS[int(number)][:1].upper() + STAYS[int(number)][1:]
    text = label.replace("_", " ")
    return text[:1].upper() + text[1:]


def variable(name: str) -> str:
    """A variable of the series for a reader."""
    words = {"ph": "pH", "fio2": "FiO₂", "gcs": "GCS", "bp": "blood pressure"}
    text = " ".join(words.get(word, word) for word in name.replace("_", " ").split(" "))
    return text if text[:2] == "pH" else text[:1].upper() + text[1:]


def metric(name: str) -> str:
    """A metric for a reader."""
    return METRICS.get(name) or name.replace("_", " ")
