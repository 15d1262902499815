"""Film -> study -> admission, ICU stay, emergency stay; and what the record holds about each film."""

from ehr_features.films.linking import link_films, note_files, stay_films
from ehr_features.films.record import add_record

__all__ = ["add_record", "link_films", "note_files", "stay_films"]
