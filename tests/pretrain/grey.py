"""A small grey film, and ways to save it and to read it back."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.store.decode import BadFilm, decode

pydicom = pytest.importorskip("pydicom")
Y, X = np.mgrid[:60, :48]
GREY = (40 + 2 * Y + X + 30 * np.sin(X / 4)).clip(0, 250).astype(np.uint8)  # (60, 48), 40..200 or so


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(tmp_path: Path, data: bytes, name: str = "film", **options: Any) -> np.ndarray:
    path = tmp_path / name
    path.write_bytes(data)
    return decode(path, **options)


def reason(tmp_path: Path, data: bytes, name: str = "film") -> str:
    with pytest.raises(BadFilm) as error:
        read(tmp_path, data, name)
    return str(error.value)


def dicom(pixels: np.ndarray, photometric: str = "MONOCHROME2", bits: int = 12, **elements: Any) -> bytes:
    """A small DICOM file of 16 bits a pixel, made here."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    ds.PixelRepresentation = int(pixels.dtype == np.int16)
    ds.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()
