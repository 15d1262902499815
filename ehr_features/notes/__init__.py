"""Write a text from the record for each film, without terms that name its findings."""

from ehr_features.notes.write import write_notes

__all__ = ["write_notes"]
