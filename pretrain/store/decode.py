"""Decode a film file (JPEG, PNG or DICOM) to uint8 grayscale; BadFilm names why a file cannot be read completely.

Nothing is cropped: the costophrenic angles are at the border of the film.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from configs import UserError

Dicom = Literal["mimic-jpg", "window"]
MAX_PIXELS = 100_000_000  # the largest detectors have about 25 million; more is damage or a decompression bomb
MIN_SIDE = 8
LUMINANCE = np.array([0.299, 0.587, 0.114])
QUALITY = 95  # of a store of JPEGs
MARK = re.compile(
    rb"\xff[^\x00\xd0-\xd7\xff]"
)  # of JPEG; behind 0xff, 0 is a value of a scan and 0xd0 to 0xd7 restarts it
HEAD = 132  # first bytes that identify a file's kind


class BadFilm(ValueError):
    """This film cannot be used; the message is a short reason without patient values."""


def film_kind(head: bytes) -> Literal["JPEG", "PNG", "DICOM"] | None:
    """The kind of a file from its first `HEAD` bytes; None: not a film."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    # DICM after the preamble, or no preamble and an element of group 2 or 8, with explicit or implicit VR
    bare = re.match(rb"[\x02\x08]\0.\0(UL|CS|UI|SH|OB|DA|[^\0][\0-\x03]\0\0)", head, re.DOTALL)
    return "DICOM" if head[128:132] == b"DICM" or bare else None


def decode(
    path: str | Path, *, dicom: Dicom = "mimic-jpg", near: int | None = None, data: bytes | None = None
) -> np.ndarray:
    """Read one film.

    Args:
        path: a file; its kind is detected from its content, not its name.
        dicom: how DICOM pixels become 8 bits: `mimic-jpg` as in MIMIC-CXR-JPG, `window` by the file's own window.
        near: a JPEG may be decoded at a reduced scale, which is faster, with its longer side at least `near` px.
        data: the file's content, if it was read already (from a URL).
    Returns: (H, W) uint8; air is dark, bone is bright. More than 8 bits are scaled from the film's lowest to its
        highest value; padding and transparent pixels are black and excluded from the scale; colours become luminance.
    Raises: BadFilm: absent, empty, truncated, of another kind, without content; UserError: DICOM without pydicom.
    """
    path = Path(path)
    try:
        if data is None and path.exists() and not path.is_file():
            raise BadFilm("not a regular file")  # reading a pipe would wait for ever, a device would never end
        data = path.read_bytes() if data is None else data
    except FileNotFoundError:
        raise BadFilm("absent") from None
    except OSError as error:
        raise BadFilm(f"cannot be read: {error.strerror}") from None
    if not data:
        raise BadFilm("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn of oddities that do no harm
            kind = film_kind(data[:HEAD])
            if kind == "DICOM" or (kind is None and path.suffix.lower() in (".dcm", ".dicom")):
                film, image = _dicom(data, dicom)
            elif kind is not None:
                film, image = _picture(data, near)
            else:
                raise BadFilm("not a JPEG, PNG or DICOM file")
    except (BadFilm, UserError):
        raise
    except Exception as error:  # damaged bytes make the decoders raise almost anything
        says = (str(error).strip().splitlines() or [""])[0]
        words = ("truncated", "unexpected end", "less than expected")
        truncated = isinstance(error, EOFError) or any(word in says.lower() for word in words)
        raise BadFilm("truncated" if truncated else f"damaged ({type(error).__name__})") from None
    shown = film if image is None else film[image]
    low, high = int(shown.min()), int(shown.max())
    if low == high:
        raise BadFilm(f"blank: every pixel is {low}")
    return film if image is None else np.where(image, film, np.uint8(0))


def fit(film: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W) uint8 so that its longer side is `size`, then pad it with black to (size, size), centred."""
    height, width = film.shape
    scale = size / max(height, width)
    new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
    if (new_height, new_width) != (height, width):
        how = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR  # BOX: the mean over the area
        film = np.asarray(Image.fromarray(film).resize((new_width, new_height), how))
    square = np.zeros((size, size), np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    square[top : top + new_height, left : left + new_width] = film
    return square


@dataclass(frozen=True)
class Square:
    """The preprocessing of a film's file to the square that a store holds and an encoder resizes.

    Args:
        size: pixels of its side.
        dicom: how DICOM pixels become 8 bits, see `decode`.
        encoding: of a store; `jpeg` changes pixels a little.
    """

    size: int
    dicom: Dicom = "mimic-jpg"
    encoding: Literal["raw", "jpeg"] = "raw"

    def __call__(self, path: str | Path) -> np.ndarray:
        """Turn a film's file into (size, size) uint8. Raises: BadFilm."""
        return self.unpack(self.pack(path))

    def of(self, film: np.ndarray) -> np.ndarray:
        """Turn a decoded film, (H, W) uint8, into its square; a square of this size is returned unchanged."""
        return film if film.shape == (self.size, self.size) else self.unpack(self._bytes(fit(film, self.size)))

    def pack(self, path: str | Path, data: bytes | None = None) -> bytes:
        """Turn a film's file, or its content, into the bytes of its square in a store. Raises: BadFilm."""
        return self._bytes(fit(decode(path, dicom=self.dicom, near=2 * self.size, data=data), self.size))

    def unpack(self, data: Any) -> np.ndarray:
        """The reverse of `pack`: bytes -> (size, size) uint8."""
        if self.encoding == "raw":
            return np.frombuffer(data, np.uint8).reshape(self.size, self.size)
        return np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)))

    def _bytes(self, square: np.ndarray) -> bytes:
        if self.encoding == "raw":
            return square.tobytes()
        file = io.BytesIO()
        Image.fromarray(square).save(file, "JPEG", quality=QUALITY)
        return file.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Its description in store.json and encoder.json."""
        return {
            "decode_at_least": 2
            * self.size,  # a larger JPEG is decoded at a reduced scale, its longer side at least this
            "dicom": self.dicom,
            "resize": self.size,  # the longer side
            "interpolation": "area",
            "enlarge": "bilinear",
            "pad": "centre",
            "pad_value": 0,
            "encoding": self.encoding,
            "quality": QUALITY if self.encoding == "jpeg" else None,
        }

    @classmethod
    def from_json(cls, meta: dict[str, Any], where: str) -> Square:
        """The reverse of `to_json`; keys missing in version 0.2.0 get their present values. Raises: UserError."""
        try:
            square = cls(int(meta["resize"]), meta["dicom"], meta.get("encoding", "raw"))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: damaged (resize, dicom or encoding is invalid)") from None
        check_same(square.to_json(), meta, where)
        return square


def check_same(ours: dict[str, Any], given: dict[str, Any], where: str) -> None:
    """Refuse a description of a different preprocessing. Raises: UserError."""
    if odd := [key for key, value in ours.items() if key in given and given[key] != value]:
        raise UserError(
            f"{where}: `{odd[0]}` is {given[odd[0]]!r}, but this version supports only {ours[odd[0]]!r}; the file "
            "was made by another version, or edited"
        )


def _check_sides(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadFilm(f"{height} x {width} px: more than {MAX_PIXELS // 1_000_000} million")
    if min(height, width) < MIN_SIDE:
        raise BadFilm(f"{height} x {width} px: smaller than {MIN_SIDE} px")


# ---- JPEG and PNG ---------------------------------------------------------------------------------------------------
def _picture(data: bytes, near: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The film, and which of its pixels are image (None: all)."""
    if data.startswith(b"\x89PNG") and (fault := _png_fault(data)):
        raise BadFilm(fault)
    if data.startswith(b"\xff\xd8") and _jpeg_end(data) is None:
        raise BadFilm("truncated")
    image = _opened(data, near)
    colour_key = image.info.get("transparency")
    if image.format == "PNG" and data[24] == 16 and (data[25] in (2, 4, 6) or colour_key is not None):
        return _deep_colour(data, colour_key)
    if image.format == "JPEG" and _cut_inside(image, data, near):
        raise BadFilm("truncated")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _eight_bits(np.asarray(image)), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image.convert("L")), None


def _opened(data: bytes, near: int | None) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except Image.DecompressionBombError:
        raise BadFilm(f"more than {MAX_PIXELS // 1_000_000} million px") from None
    _check_sides(image.height, image.width)
    if near is not None and max(image.size) > near:
        scale = near / max(image.size)
        image.draft("L", (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    return image


def _deep_colour(data: bytes, key: int | tuple[int, ...] | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode a PNG of 16 bits with colour or transparency; Pillow would keep only 8 bits (a 12-bit film would be
    black)."""
    import torch
    from torchvision.io import decode_image

    planes = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8)).numpy().astype(np.float64)
    grey = planes[0] if len(planes) < 3 else np.tensordot(LUMINANCE, planes[:3], 1)
    if len(planes) in (2, 4):
        image = planes[-1] > 0
        return (_eight_bits(grey, image) * (planes[-1] / 65535)).astype(np.uint8), image
    image = None if key is None else (planes != np.reshape(key, (-1, 1, 1))).any(0)
    return _eight_bits(grey, image), image


def _jpeg_end(data: bytes) -> int | None:
    """Position of the end mark of the first picture, which may be followed by other data; None: there is none.

    libjpeg fills missing data with grey, without a warning if the end of the file is zeros.
    """
    at = 2
    while (mark := MARK.search(data, at)) is not None:
        at, kind = mark.end(), mark[0][-1]
        if kind == 0xD9:
            return mark.start()
        at += 0 if kind in (0x01, 0xD8) else int.from_bytes(data[at : at + 2])
    return None


def _cut_inside(image: Image.Image, data: bytes, near: int | None) -> bool:
    """Whether a scan ends before the picture does although the end mark follows.

    libjpeg then fills the rest with grey. The data after the scan is read only if something is missing: then more data
    changes the picture. (Damage in the middle of a scan cannot be detected: JPEG has no check sums.)
    """
    pixels, end = np.asarray(image), _jpeg_end(data)
    if (pixels[-1, -1] != 128).any():
        return False
    longer = _opened(data[:end] + bytes(range(1, 129)) + data[end:], near)
    return not np.array_equal(np.asarray(longer), pixels)


def _png_fault(data: bytes) -> str | None:
    """The fault in the chunks of a PNG, down to the last, or in their check sums, which Pillow does not verify."""
    at, kind = 8, b""
    while kind != b"IEND":
        if at + 12 > len(data):
            return "truncated"
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            return "truncated"
        if zlib.crc32(data[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return "damaged (check sum)"
        at = end + 4
    return None


def _eight_bits(values: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """Scale from the lowest to the highest value (of the image) to 0..255, truncated."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise BadFilm("not a number in a pixel")
    shown = values if image is None else values[image]
    low, high = (shown.min(), shown.max()) if shown.size else (0.0, 0.0)
    return ((values.clip(low, high) - low) / ((high - low) or 1.0) * 255).astype(np.uint8)


# ---- DICOM ----------------------------------------------------------------------------------------------------------
def _dicom(data: bytes, mode: Dicom) -> tuple[np.ndarray, np.ndarray | None]:
    """The film, and which of its pixels are image (None: all)."""
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, pixel_array
    except ImportError:
        raise UserError("DICOM films need pydicom: pip install 'ehr-msn[dicom]'") from None
    try:
        ds = pydicom.dcmread(io.BytesIO(data), force=data[128:132] != b"DICM")
    except Exception as error:
        raise BadFilm(f"not a whole DICOM file ({type(error).__name__})") from None
    if "TransferSyntaxUID" not in ds.file_meta:  # a file without meta information, as in old archives
        implicit = ds.original_encoding[0]
        ds.file_meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        )
    if "PixelData" not in ds or "Rows" not in ds or "Columns" not in ds:
        raise BadFilm("DICOM without pixels")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise BadFilm(f"DICOM of {ds.NumberOfFrames} frames")
    _check_sides(int(ds.Rows), int(ds.Columns))
    try:
        pixels = pixel_array(ds)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        name = ds.file_meta.TransferSyntaxUID.name
        raise BadFilm(f"{name}: no decoder; pip install pylibjpeg pylibjpeg-libjpeg") from None
    kind = str(ds.get("PhotometricInterpretation", "MONOCHROME2"))
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, ds)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] @ LUMINANCE
    for name in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
        if name in ds and ds[name].is_empty:  # many archives write the tag empty: treat it as absent
            del ds[name]
    image = None
    if kind.startswith("MONO"):
        image = _not_padding(pixels, ds)
        pixels = _modality(pixels, ds)
    film = _eight_bits(pixels, image) if mode == "mimic-jpg" else _window(pixels, ds, image)
    film = 255 - film if kind == "MONOCHROME1" else film
    return (equalise(film, image) if mode == "mimic-jpg" else film), image


def _not_padding(pixels: np.ndarray, ds: Any) -> np.ndarray | None:
    """Which pixels are image (DICOM PS3.3, C.7.5.1.1.2); None: all, or the file defines no padding."""
    first = ds.get("PixelPaddingValue")
    if first is None or first == "":
        return None
    last = ds.get("PixelPaddingRangeLimit")
    ends = [int(first), int(first if last is None or last == "" else last)]
    if ds.get("PixelRepresentation"):  # some programs write it as an unsigned number
        ends = [end - 2**16 if end >= 2**15 else end for end in ends]
    padding = (pixels >= min(ends)) & (pixels <= max(ends))
    if padding.all():
        raise BadFilm("blank: every pixel is padding")
    return ~padding if padding.any() else None


def _modality(pixels: np.ndarray, ds: Any) -> np.ndarray:
    """Convert stored values to those to which the window applies (DICOM PS3.3, C.11.1)."""
    if ds.get("ModalityLUTSequence"):
        return _looked_up(pixels, ds, "ModalityLUTSequence")
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    return pixels if (slope, intercept) == (1, 0) else pixels * slope + intercept


def _looked_up(values: np.ndarray, ds: Any, sequence: str) -> np.ndarray:
    """Map values by a table of the file; pydicom supports tables of 8 or 16 bits only, files have 10 to 16."""
    item = ds[sequence][0]
    entries, first, _bits = item.LUTDescriptor
    table, entries = item.LUTData, int(entries) or 2**16
    if isinstance(table, bytes):  # two bytes per entry, or one
        order = "<" if ds.original_encoding[1] else ">"
        table = np.frombuffer(table, np.uint8 if len(table) < 2 * entries else f"{order}u2")
    if len(table) < entries:
        raise BadFilm("its table of grey values is cut short")
    return np.asarray(table)[(np.round(values).astype(np.int64) - int(first)).clip(0, entries - 1)]


def _window(values: np.ndarray, ds: Any, image: np.ndarray | None) -> np.ndarray:
    """Apply the grey window of the file (DICOM PS3.3, C.11.2), else its table, else scale from lowest to highest
    value."""
    if "WindowCenter" not in ds or "WindowWidth" not in ds:
        return _eight_bits(_looked_up(values, ds, "VOILUTSequence") if ds.get("VOILUTSequence") else values, image)
    first = [
        v[0] if isinstance(v, (list, tuple)) or hasattr(v, "append") else v for v in (ds.WindowCenter, ds.WindowWidth)
    ]
    centre, width = float(first[0]), max(float(first[1]), 1e-6)
    shape = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    values = values.astype(np.float64)
    if shape == "SIGMOID":
        part = 1 / (1 + np.exp(-4 * (values - centre) / width))
    elif shape == "LINEAR_EXACT" or width <= 1:
        part = (values - centre) / width + 0.5
    else:
        part = (values - (centre - 0.5)) / (width - 1) + 0.5
    if not np.isfinite(part).all():
        raise BadFilm("not a number in its window or rescaling")
    return (np.clip(part, 0, 1) * 255).round().astype(np.uint8)


def equalise(film: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """Histogram equalisation as in OpenCV's equalizeHist, with which MIMIC-CXR-JPG was made (uint8 -> uint8).

    Args:
        image: the pixels to count; None: all.
    """
    counts = np.bincount(film.ravel() if image is None else film[image], minlength=256)
    first = int(np.flatnonzero(counts)[0])
    rest = int(counts.sum() - counts[first])
    if rest == 0:
        return film.copy()
    counts[first] = 0  # the lowest value becomes 0
    return np.round(np.cumsum(counts) * (255.0 / rest)).clip(0, 255).astype(np.uint8)[film]
