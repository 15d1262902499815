"""DICOM films: gray levels, windows, padding, tables, compression; what is refused."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.store.decode import BadFilm, decode, equalise, film_kind, fit
from tests.pretrain.grey import GREY, X, dicom, pydicom, read, reason, saved

DEEP = (200 + 12 * GREY.astype(np.uint16)).astype(np.uint16)


def as_mimic(pixels: np.ndarray, invert: bool) -> np.ndarray:
    """The steps in the MIMIC-CXR-JPG paper, value by value: min-max to 8 bits, invert, equalise."""
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
