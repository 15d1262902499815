"""Raw MIMIC tables -> features/. Imports no torch."""
