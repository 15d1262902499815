"""Link films to studies, admissions, ICU stays and emergency stays, and add columns of the record."""

from ehr_features.films.linking import link_films, note_files, stay_films
from ehr_features.films.record import add_record

__all__ = ["add_record", "link_films", "note_files", "stay_films"]
