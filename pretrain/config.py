"""What the commands of pretrain/ read from their YAML files. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from configs import Settings


class ImagesConfig(Settings):
    """Films -> store/: one of `mimic_cxr` and `films`; a reason stands beside each setting."""

    mimic_cxr: str | None = None  # a MIMIC-CXR-JPG (or MIMIC-CXR) folder: its metadata table says which films there are
    films: str | None = None  # instead: a folder of films, or a list of them (.txt; .csv or .parquet with a column path)
    out: str  # the store/ to write
    size: int = Field(256, ge=16, le=4096)  # side of the stored square; films are resized to fit, then padded
    views: Literal["frontal", "all"] = "frontal"  # frontal: AP and PA, by the metadata table
    per_subject_cap: int | None = Field(None, ge=1)  # at most so many films a subject, drawn by `seed`
    encoding: Literal["raw", "jpeg"] = "raw"  # raw reads without a copy; jpeg takes about a tenth of the disk
    dicom: Literal["mimic-jpg", "window"] = "mimic-jpg"  # as MIMIC-CXR-JPG was made, or the file's own grey window
    workers: int | None = Field(None, ge=1, le=256)  # processes that decode; None: one a core
    seed: int = 0  # of per_subject_cap

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.mimic_cxr is None) == (self.films is None):
            raise ValueError("wanted one of `mimic_cxr` (a MIMIC-CXR-JPG folder) and `films` (a folder or a list)")
        if self.films is not None and self.per_subject_cap is not None:
            raise ValueError("`per_subject_cap` needs subjects: it goes with `mimic_cxr`, not with `films`")
        return self
