"""A synthetic MIMIC with a planted signal. Import its modules: `generate`, `plan`, `truth`."""
