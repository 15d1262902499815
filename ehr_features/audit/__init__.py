"""Prove or refute claims about leaks and values from the raw tables, independently of the extraction code."""

from ehr_features.audit.claims import audit

__all__ = ["audit"]
