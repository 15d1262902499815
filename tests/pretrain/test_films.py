"""Films of every kind become the right 8-bit grey; what is not a whole film is refused with its reason."""

import importlib.util
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.store.decode import BadFilm, decode, equalise, film_id, film_kind, fit

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


# ---- JPEG and PNG ---------------------------------------------------------------------------------------------------
def test_png_of_every_mode_gives_its_luminance(tmp_path: Path) -> None:
    grey = Image.fromarray(GREY)
    colour = Image.merge("RGB", [grey, grey.point(lambda v: v // 2), grey.point(lambda v: 255 - v)])
    for image in (grey, grey.convert("RGB"), grey.convert("RGBA"), grey.convert("LA"), grey.convert("P")):
        assert (read(tmp_path, saved(image, "PNG")) == GREY).all(), image.mode
    luminance = np.asarray(colour) @ [0.299, 0.587, 0.114]
    assert np.abs(read(tmp_path, saved(colour, "PNG")) - luminance).max() <= 1
    palette = colour.quantize(200)
    wanted = np.asarray(palette.convert("RGB")) @ [0.299, 0.587, 0.114]
    assert np.abs(read(tmp_path, saved(palette, "PNG")) - wanted).max() <= 1
    assert set(np.unique(read(tmp_path, saved(grey.convert("1"), "PNG")))) == {0, 255}


def test_transparent_pixels_are_black(tmp_path: Path) -> None:
    image = Image.fromarray(np.dstack([GREY] * 3 + [np.where(X < 10, 0, 255).astype(np.uint8)]))
    film = read(tmp_path, saved(image, "PNG"))
    assert (film[:, :10] == 0).all() and (film[:, 10:] == GREY[:, 10:]).all()


def test_sixteen_bits_are_scaled_from_the_lowest_to_the_highest_value(tmp_path: Path) -> None:
    deep = 1000 + GREY.astype(np.uint16) * 11  # 12 bits in 16, far from 65535
    film = read(tmp_path, saved(Image.fromarray(deep), "PNG"))
    spread = (GREY.astype(float) - GREY.min()) / (GREY.max() - GREY.min()) * 255
    assert (film.min(), film.max()) == (0, 255) and np.abs(film - spread).max() <= 1


@pytest.mark.parametrize(("kind", "planes"), [(2, 3), (4, 2), (6, 4)])  # PNG's colour types: RGB, grey + alpha, RGBA
def test_sixteen_bits_with_colour_or_transparency_keep_their_depth(tmp_path: Path, kind: int, planes: int) -> None:
    deep = np.repeat((100 + GREY.astype(np.uint16) * 3)[..., None], planes, axis=2).astype(">u2")  # 10 bits in 16
    if kind in (4, 6):
        deep[..., -1] = 65535
    film = read(tmp_path, png(deep, kind))
    spread = (GREY.astype(float) - GREY.min()) / (GREY.max() - GREY.min()) * 255
    assert np.abs(film - spread).max() <= 1


def test_jpeg_of_every_mode_gives_its_luminance(tmp_path: Path) -> None:
    for mode in ("L", "RGB", "CMYK"):
        film = read(tmp_path, saved(Image.fromarray(GREY).convert(mode), "JPEG", quality=98))
        assert film.shape == GREY.shape and np.abs(film.astype(int) - GREY).mean() < 2, mode


def test_a_photographed_film_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    film = read(tmp_path, saved(Image.fromarray(GREY), "JPEG", quality=98, exif=exif))
    assert np.abs(film.astype(int) - np.rot90(GREY, -1)).mean() < 2


def test_reading_near_a_size_is_like_reading_whole(tmp_path: Path) -> None:
    big = Image.fromarray(GREY).resize((960, 1200), Image.Resampling.BICUBIC)
    data = saved(big, "JPEG", quality=95)
    near = read(tmp_path, data, near=128)
    assert 128 <= max(near.shape) < 512  # decoded small
    assert np.abs(fit(near, 64).astype(int) - fit(read(tmp_path, data), 64)).max() <= 3


@pytest.mark.parametrize("near", [None, 4000, 96, 16])
@pytest.mark.parametrize("shape", [(8, 2000), (2000, 8), (16, 4000), (1100, 8), (9, 700)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_film_of_extreme_shape_is_read(tmp_path: Path, shape: tuple[int, int], near: int, kind: str) -> None:
    film = np.linspace(0, 255, max(shape)).astype(np.uint8)[None].repeat(min(shape), 0)
    film = film if shape[0] < shape[1] else film.T
    found = fit(
        read(tmp_path, saved(Image.fromarray(film), kind, **({"quality": 95} if kind == "JPEG" else {})), near=near), 48
    )
    line = found.max(axis=0 if shape[0] < shape[1] else 1)
    assert found.shape == (48, 48) and np.abs(line - np.linspace(2, 252, 48)).max() < 12


def png(values: np.ndarray, kind: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits; `kind`: 0 grey, 2 RGB, 4 grey + alpha, 6 RGBA."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *values.shape[1::-1], 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


@pytest.mark.parametrize("kind", [0, 2, 4, 6])
def test_what_is_transparent_in_sixteen_bits_is_black_and_in_no_scale(tmp_path: Path, kind: int) -> None:
    deep = 900 + GREY.astype(np.uint16) * 9
    clear = X < 10
    planes = np.repeat(np.where(clear, 60_000, deep)[..., None], {0: 1, 2: 3, 4: 2, 6: 4}[kind], axis=2)
    if kind in (4, 6):
        planes[..., -1] = np.where(clear, 0, 65_535)
    key = [(b"tRNS", struct.pack(">H", 60_000) * planes.shape[2])] if kind in (0, 2) else []
    film, seen = read(tmp_path, png(planes, kind, *key)), GREY[:, 10:].astype(float)
    assert (film[:, :10] == 0).all()
    assert np.abs(film[:, 10:] - (seen - seen.min()) / np.ptp(seen) * 255).max() <= 1


# ---- fit ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (50, 20), (64, 64), (1000, 8), (301, 77)])
def test_fit_keeps_the_whole_film_and_pads_with_black(shape: tuple[int, int]) -> None:
    film = np.full(shape, 200, np.uint8)
    square = fit(film, 64)
    height, width = (max(1, round(side * 64 / max(shape))) for side in shape)
    rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
    assert square.shape == (64, 64) and (len(rows), len(columns)) == (height, width)
    assert abs((rows[0] + rows[-1]) - 63) <= 1 and abs((columns[0] + columns[-1]) - 63) <= 1  # centred
    assert set(np.unique(square)) <= {0, 200}


def test_fit_takes_the_mean_over_the_area_and_loses_no_corner() -> None:
    film = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    blocks = film.reshape(64, 4, 64, 4).mean((1, 3))
    assert np.abs(fit(film, 64) - blocks).max() <= 1
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        film = np.zeros((512, 384), np.uint8)
        film[corner] = 255
        assert fit(film, 256).max() >= 63  # a quarter of a pixel


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_reasons(tmp_path: Path) -> None:
    grey = Image.fromarray(GREY)
    assert reason(tmp_path, b"") == "empty file"
    assert reason(tmp_path, b"hello, this is text") == "not a JPEG, PNG or DICOM file"
    assert reason(tmp_path, saved(grey, "GIF"), "film.jpg") == "not a JPEG, PNG or DICOM file"
    assert reason(tmp_path, saved(grey.resize((1, 1)), "PNG")) == "1 x 1 px: smaller than 8 px"
    assert reason(tmp_path, saved(Image.new("L", (20, 20)), "PNG")) == "blank: every pixel is 0"
    assert reason(tmp_path, b"not dicom", "film.dcm") == "DICOM without pixels"
    with pytest.raises(BadFilm, match=r"^absent$"):
        decode(tmp_path / "nothing.jpg")
    with pytest.raises(BadFilm, match="cannot be read: Is a directory"):
        decode(tmp_path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [20_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    assert "more than 100 million" in reason(tmp_path, data)


ENCODED = {
    "baseline": saved(Image.fromarray(GREY), "JPEG", quality=90),
    "progressive": saved(Image.fromarray(GREY), "JPEG", quality=90, progressive=True),
    "png": saved(Image.fromarray(GREY), "PNG"),
}


@pytest.mark.parametrize("kind", ENCODED)
@pytest.mark.parametrize("tail", ["cut", "zeros"])
def test_a_truncated_film_is_never_read_half(tmp_path: Path, kind: str, tail: str) -> None:
    data = ENCODED[kind]
    for length in range(1, len(data) - 1, 11):
        rest = b"" if tail == "cut" else bytes(len(data) - length)
        with pytest.raises(BadFilm):
            read(tmp_path, data[:length] + rest)
    assert reason(tmp_path, data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("near", [None, 24])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_scan_that_ends_early_is_truncated_although_the_end_mark_follows(
    tmp_path: Path, mode: str, near: int
) -> None:
    big = Image.fromarray(GREY).resize((240, 300))
    data = saved(big.convert(mode), "JPEG", quality=90)
    scan = data.rindex(b"\xff\xda")
    for part in (0.1, 0.5, 0.9):
        with pytest.raises(BadFilm, match=r"^truncated$"):
            read(tmp_path, data[: scan + int(part * (len(data) - scan))].rstrip(b"\xff") + b"\xff\xd9", near=near)
    grey = np.pad(np.asarray(big), 16, constant_values=128)  # as libjpeg fills what is missing
    whole = saved(Image.fromarray(grey).convert(mode), "JPEG", quality=90)
    assert np.abs(read(tmp_path, whole).astype(int) - grey).mean() < 2


def test_what_follows_the_first_picture_is_not_looked_at(tmp_path: Path) -> None:
    data = ENCODED["baseline"]
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data  # a whole picture within a segment
    for more in (data[: len(data) // 2], data, b"\0" * 9, b"text"):
        assert (read(tmp_path, data + more) == read(tmp_path, data)).all()
    assert (read(tmp_path, data[:2] + thumbnail + data[2:]) == read(tmp_path, data)).all()
    assert reason(tmp_path, data[:2] + thumbnail + data[2 : len(data) // 2]) == "truncated"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([*ENCODED, "dicom"]),
    changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=9),
)
def test_damaged_bytes_give_a_film_or_a_reason(tmp_path: Path, kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(ENCODED.get(kind) or dicom(GREY.astype(np.uint16)))
    for at, value in changes:
        data[at % len(data)] = value
    try:
        film = read(tmp_path, bytes(data))
    except BadFilm as error:
        assert str(error)
    else:
        assert film.dtype == np.uint8 and film.ndim == 2


# ---- DICOM ----------------------------------------------------------------------------------------------------------
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


DEEP = (200 + 12 * GREY.astype(np.uint16)).astype(np.uint16)


def as_mimic(pixels: np.ndarray, invert: bool) -> np.ndarray:
    """How the MIMIC-CXR-JPG paper tells it, value by value: min-max to 8 bits, invert, equalise."""
    film = ((pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255).astype(int)
    film = 255 - film if invert else film
    lowest = (film == film.min()).sum()
    table = np.zeros(256, np.uint8)
    for value in np.unique(film):
        table[value] = round(((film <= value).sum() - lowest) / (film.size - lowest) * 255)
    return table[film]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_mimic_jpg_mode_is_min_max_invert_equalise(tmp_path: Path, photometric: str) -> None:
    film = read(tmp_path, dicom(DEEP, photometric), dicom="mimic-jpg")
    assert (film == as_mimic(DEEP.astype(float), photometric == "MONOCHROME1")).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_equalise_spreads_values_and_keeps_their_order(values: list[int]) -> None:
    film = np.array([values], np.uint8)
    flat = equalise(film)
    if film.min() == film.max():
        assert (flat == film).all()
    else:
        order = np.argsort(film[0], kind="stable")
        assert (np.diff(flat[0][order].astype(int)) >= 0).all() and (flat.min(), flat.max()) == (0, 255)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("mode", ["mimic-jpg", "window"])
def test_a_dicom_and_its_jpeg_agree(tmp_path: Path, photometric: str, mode: str) -> None:
    film = read(tmp_path, dicom(DEEP, photometric), dicom=mode)
    as_jpeg = read(tmp_path, saved(Image.fromarray(film), "JPEG", quality=95))
    assert np.abs(fit(film, 32).astype(int) - fit(as_jpeg, 32)).mean() < 2


def test_the_window_of_the_file_is_used_after_rescaling(tmp_path: Path) -> None:
    window = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 2000, "WindowWidth": 1001}
    film = read(tmp_path, dicom(DEEP, **window), dicom="window")
    values = DEEP.astype(float) * 2 - 1000
    wanted = np.interp(values, [1499.5, 2499.5], [0, 255])  # C.11.2.1.2: c - 0.5 -+ (w - 1) / 2
    assert np.abs(film - wanted).max() <= 0.5
    dark = read(tmp_path, dicom(DEEP, "MONOCHROME1", **window), dicom="window")
    assert (dark == 255 - film).all()
    first = window | {"WindowCenter": [2000, 1], "WindowWidth": [1001, 2]}
    assert (read(tmp_path, dicom(DEEP, **first), dicom="window") == film).all()
    exact = read(tmp_path, dicom(DEEP, **window, VOILUTFunction="LINEAR_EXACT"), dicom="window")
    assert np.abs(exact - np.interp(values, [1499.5, 2500.5], [0, 255])).max() <= 0.5
    curve = read(tmp_path, dicom(DEEP, **window, VOILUTFunction="SIGMOID"), dicom="window")
    assert np.abs(curve - 255 / (1 + np.exp(-4 * (values - 2000) / 1001))).max() <= 0.5


def test_empty_elements_are_as_good_as_absent(tmp_path: Path) -> None:
    empty = dict.fromkeys(("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"), "")
    assert (read(tmp_path, dicom(DEEP, **empty), dicom="window") == read(tmp_path, dicom(DEEP), dicom="window")).all()
    assert (read(tmp_path, dicom(DEEP, **empty)) == read(tmp_path, dicom(DEEP))).all()


@pytest.mark.parametrize("name", ["RescaleSlope", "WindowCenter", "WindowWidth"])
def test_a_window_or_slope_that_is_no_number_is_told(tmp_path: Path, name: str) -> None:
    window = {"RescaleSlope": "1.00", "RescaleIntercept": "0", "WindowCenter": "2000", "WindowWidth": "4000"}
    data = dicom(DEEP, **window).replace(window[name].encode(), b"nan ")
    path = tmp_path / "film.dcm"
    path.write_bytes(data)
    with pytest.raises(BadFilm, match="not a number"):
        decode(path, dicom="window")


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("slope", "intercept"), [(-1, 4095), (-1, None), (-0.5, 0), (2, -1000), (None, 7), (1, 0)])
@pytest.mark.parametrize("mode", ["mimic-jpg", "window"])
def test_the_sign_of_the_slope_counts(
    tmp_path: Path, mode: str, slope: float | None, intercept: float | None, photometric: str
) -> None:
    given = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    given = {name: value for name, value in given.items() if value is not None}
    inverse = photometric == "MONOCHROME1"
    values = DEEP.astype(float) * (slope or 1)
    film = read(tmp_path, dicom(DEEP, photometric, **given), dicom=mode)
    if mode == "mimic-jpg":
        assert np.abs(film.astype(int) - as_mimic(values, inverse)).max() <= 6  # a value of 255 more or less
    else:
        spread = (values - values.min()) / np.ptp(values) * 255
        assert np.abs(film - (255 - spread if inverse else spread)).max() <= 1


PADDING = {  # padding in the stored values -> the elements that tell of it
    "above": (4095, {"PixelPaddingValue": 4095}),
    "below": (0, {"PixelPaddingValue": 0}),
    "range": ((3900, 4095), {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 3900}),
    "range upwards": ((0, 150), {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 150}),
    "signed": (-2000, {"PixelPaddingValue": -2000}),
    "signed range": ((-2000, -1500), {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1500}),
}
TABLE = {"entries": 4096, "first": 0, "bits": 12}


def table_of(values: np.ndarray, first: int = 0, bits: int = 12, form: str = "OW") -> Any:
    """A sequence of one table of grey values."""
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(values) % 2**16, first, bits])
    data = (
        values.astype("<u2").tobytes()
        if form == "OW"
        else values.astype(np.uint8).tobytes()
        if form == "OB"
        else values.tolist()
    )
    item.add_new("LUTData", "OW" if form == "OB" else form, data)
    return pydicom.Sequence([item])


WAYS = {  # how the file says that its values are shown
    "plain": {},
    "rescaled": {"RescaleSlope": 2, "RescaleIntercept": -1000},
    "negative": {"RescaleSlope": -1, "RescaleIntercept": 4095},
    "window": {"WindowCenter": 1500, "WindowWidth": 2500},
    "VOI table": {"VOILUTSequence": table_of(np.sqrt(np.arange(4096) * 4095))},
    "modality table": {"ModalityLUTSequence": table_of(np.arange(4096)[::-1])},
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("mode", ["mimic-jpg", "window"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", PADDING)
def test_padding_is_no_image(tmp_path: Path, where: str, way: str, mode: str, photometric: str) -> None:
    padding, said = PADDING[where]
    ends, signed = np.atleast_1d(padding), where.startswith("signed")
    inside = X >= 9
    values = np.where(inside, DEEP, np.linspace(ends[0], ends[-1], X.size).reshape(X.shape).round())
    film = read(
        tmp_path,
        dicom(values.astype(np.int16 if signed else np.uint16), photometric, 16 if signed else 12, **said, **WAYS[way]),
        dicom=mode,
    )
    alone = read(
        tmp_path,
        dicom(DEEP[:, 9:].astype(np.int16 if signed else np.uint16), photometric, 16 if signed else 12, **WAYS[way]),
        dicom=mode,
    )
    assert (film[:, :9] == 0).all() and (film[:, 9:] == alone).all()
    if way != "window" or mode == "mimic-jpg":
        assert (film[:, 9:].min(), film[:, 9:].max()) == (0, 255)


def test_a_film_of_padding_alone_or_of_nothing_beside_it_is_blank(tmp_path: Path) -> None:
    flat = np.full_like(DEEP, 4095)
    assert reason(tmp_path, dicom(flat, PixelPaddingValue=4095)) == "blank: every pixel is padding"
    flat[:, 9:] = 700
    assert reason(tmp_path, dicom(flat, PixelPaddingValue=4095)).startswith("blank")
    assert (read(tmp_path, dicom(DEEP, PixelPaddingValue=4095)) == read(tmp_path, dicom(DEEP))).all()  # none is there


@pytest.mark.parametrize("mode", ["mimic-jpg", "window"])
@pytest.mark.parametrize("form", ["OW", "US", "OB"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_table_of_any_depth_shows_the_film(tmp_path: Path, bits: int, form: str, mode: str) -> None:
    if form == "OB" and bits > 8:
        pytest.skip("an entry of more than 8 bits takes two bytes")
    film = (np.arange(4096)[::-1] * (2**bits - 1) / 4095).astype(np.uint16)
    found = read(tmp_path, dicom(DEEP, ModalityLUTSequence=table_of(film, 0, bits, form)), dicom=mode)
    wanted = read(tmp_path, dicom(film[DEEP], bits=16), dicom=mode)
    assert (found == wanted).all() and found[0, 0] > found[-1, -1]  # the table is an inverse one
    voi = read(tmp_path, dicom(DEEP, VOILUTSequence=table_of(film, 0, bits, form)), dicom="window")
    assert (voi == read(tmp_path, dicom(film[DEEP], bits=16), dicom="window")).all()


@pytest.mark.parametrize("first", [-300, 0, 250])
def test_tables_agree_with_pydicoms_own_where_those_are_right(tmp_path: Path, first: int) -> None:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    rng = np.random.default_rng(0)
    item = table_of(rng.integers(0, 2**16, 1500), first, 16)
    for name, apply in (("ModalityLUTSequence", apply_modality_lut), ("VOILUTSequence", apply_voi_lut)):
        data = dicom(DEEP.astype(np.int16), bits=16, **{name: item})
        values = apply(DEEP.astype(np.int32), pydicom.dcmread(io.BytesIO(data))).astype(float)
        spread = (values - values.min()) / np.ptp(values) * 255
        assert np.abs(read(tmp_path, data, dicom="window") - spread).max() <= 1


def test_signed_pixels_and_files_without_a_window(tmp_path: Path) -> None:
    signed = DEEP.astype(np.int16) - 1500
    spread = (DEEP - DEEP.min()) / (DEEP.max() - DEEP.min()) * 255
    film = read(tmp_path, dicom(signed, bits=16), dicom="window")
    assert np.abs(film - spread).max() <= 1


def test_colour_dicom_becomes_luminance(tmp_path: Path) -> None:
    colour = np.dstack([DEEP, DEEP // 2, DEEP // 3])
    film = read(tmp_path, dicom(colour, "RGB"), dicom="window")
    luminance = colour @ [0.299, 0.587, 0.114]
    spread = (luminance - luminance.min()) / np.ptp(luminance) * 255
    assert np.abs(film - spread).max() <= 1


def test_a_compression_without_a_decoder_is_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("pylibjpeg") is not None or importlib.util.find_spec("gdcm") is not None:
        pytest.skip("a decoder of lossless JPEG is installed")
    ds = pydicom.dcmread(io.BytesIO(dicom(DEEP)))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8 lossless"])
    file = io.BytesIO()
    ds.save_as(file)
    assert "JPEG Lossless" in reason(tmp_path, file.getvalue()) and "pylibjpeg" in reason(tmp_path, file.getvalue())


def test_dicom_that_is_no_single_film_is_refused(tmp_path: Path) -> None:
    assert reason(tmp_path, dicom(DEEP, NumberOfFrames=3)) == "DICOM of 3 frames"
    assert reason(tmp_path, dicom(DEEP, Rows=60_000, Columns=60_000)).startswith("60000 x 60000 px")
    assert reason(tmp_path, dicom(DEEP, Rows=70)) == "truncated"
    whole = dicom(DEEP)
    for length in range(132, len(whole) - 1, 97):
        with pytest.raises(BadFilm):
            read(tmp_path, whole[:length])


@pytest.mark.parametrize("name", ["1.2.840.113619.2.55.3.0", "00000001", "film.dcm", "film.img"])
def test_dicom_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    whole = dicom(DEEP)
    for data in (whole, whole[132:], bare(implicit=True), bare(implicit=False)):
        assert film_kind(data[:132]) == "DICOM"
        assert (read(tmp_path, data, name) == read(tmp_path, whole)).all()
    for head in (b"", b"\x02\x08", b"\x08\0", b"text, and more of it", b"PK\x03\x04", b"\0" * 132, b"GIF89a"):
        assert film_kind(head) is None


def bare(implicit: bool) -> bytes:
    """A DICOM file without preamble and meta information, as old archives hold them."""
    ds = pydicom.dcmread(io.BytesIO(dicom(DEEP)))
    del ds.file_meta
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("1.2.840.113619.2.55.3.0", "1.2.840.113619.2.55.3.0"),
        ("a/1.2.3.dcm", "1.2.3"),
        ("1.2.3.DICOM", "1.2.3"),
        ("00000001", "00000001"),
        ("s/00000001_000.png", "00000001_000"),
        ("film.JPEG", "film"),
        ("a.b.jpg", "a.b"),
        (".jpg", ".jpg"),
    ],
)
def test_a_films_id_is_its_name_without_a_films_suffix(name: str, says: str) -> None:
    assert film_id(name) == film_id(Path(name)) == says


# ---- real files -----------------------------------------------------------------------------------------------------
@pytest.mark.real
def test_real_dicom_agrees_with_a_jpeg_made_as_mimic_cxr_jpg_was(tmp_path: Path, shared: Path) -> None:
    paths = sorted((shared / "data/dicom_samples").glob("*.dcm"))
    films = [p for p in paths if p.name != "SC_rgb_16bit.dcm"]
    assert len(films) == 4
    for path in films:
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array.astype(np.float64)
        jpeg = saved(
            Image.fromarray(as_mimic(pixels, ds.PhotometricInterpretation == "MONOCHROME1")), "JPEG", quality=95
        )
        ours, theirs = fit(decode(path), 256).astype(int), fit(read(tmp_path, jpeg), 256).astype(int)
        assert np.abs(ours - theirs).mean() < 1, path.name
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999, path.name


@pytest.mark.real
def test_real_odd_inputs(shared: Path) -> None:
    odd = shared / "data/odd_inputs"
    assert decode(odd / "cxr_16bit_monochrome1_from_RG1.png").std() > 20
    for path in odd.glob("nih_rgba_*.png"):
        rgba = np.asarray(Image.open(path).convert("RGBA")).astype(float)
        assert np.abs(decode(path) - rgba[..., :3].mean(2)).max() <= 1
    for name, why in (("empty.jpg", "empty file"), ("truncated.jpg", "truncated")):
        with pytest.raises(BadFilm, match=f"^{why}$"):
            decode(odd / name)
