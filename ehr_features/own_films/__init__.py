"""Films outside MIMIC: a table of a row per film, in a published layout or any other, read for every command alike."""
