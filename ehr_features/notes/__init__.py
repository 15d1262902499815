"""A text of the record for each film, without terms of its findings."""

from ehr_features.notes.write import write_notes

__all__ = ["write_notes"]
