"""Claims about leaks and values, proved or refuted from the raw tables by other code than made them."""

from ehr_features.audit.claims import audit

__all__ = ["audit"]
