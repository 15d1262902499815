"""Films of every kind become correct 8-bit grey; incomplete films are refused with a reason."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ehr_features.own_films.ids import film_id
from pretrain.store.decode import BadFilm, decode, fit
from tests.pretrain.grey import GREY, X, dicom, read, reason, saved


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
    with pytest.raises(BadFilm, match="not a regular file"):
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
