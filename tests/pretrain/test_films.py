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

from pretrain.store.decode import BadFilm, decode, equalise, fit

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
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", GREY.shape[1], GREY.shape[0], 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    )
    film = read(tmp_path, data)
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
