"""Small files that expand to more than the memory, pipes and devices in place of files, false footers: refused."""

import gzip
import io
import os
import resource
import struct
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs import UserError
from ehr_features.raw import remote, source
from ehr_features.raw.remote import user_table
from pretrain.store.decode import BadFilm, decode
from pretrain.store.listing import films_of


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def no_memory_taken():
    before = peak()
    yield
    assert peak() - before < 400_000_000


# ---- tables ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def packed() -> bytes:
    """20 KB of gzip that expand to 20 MB of rows."""
    return gzip.compress(b"path,label\n" + b"a.png,1\n" * 2_500_000, 6)


@pytest.mark.usefixtures("no_memory_taken")
def test_a_gzip_that_expands_a_thousandfold_is_refused_before_it_is_read(tmp_path, packed):
    path = tmp_path / "films.csv.gz"
    path.write_bytes(packed * 2)
    with pytest.raises(UserError, match=r"films\.csv\.gz: expands to more than .* MB"):
        user_table(path, dtype=str)
    with pytest.raises(UserError, match=r"films\.csv\.gz: its start expands to more than .* MB"):
        source.header(str(path))


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.zip", ".csv.xz", ".csv.bz2", ".parquet"])
def test_a_users_table_is_read_in_each_form_and_one_with_a_column_twice_is_refused(tmp_path, suffix):
    path, rows = tmp_path / f"films{suffix}", pd.DataFrame({"path": ["a.png", "b.png"], "a": [0, 1], "b": [1, 0]})

    def write(table):
        if suffix == ".parquet":
            pq.write_table(pa.table([pa.array(table.iloc[:, i]) for i in range(3)], names=list(table)), path)
        else:
            table.to_csv(path, index=False)

    write(rows)
    pd.testing.assert_frame_equal(user_table(path), rows, check_dtype=False)
    write(rows.set_axis(["path", "b", "b"], axis=1))
    with pytest.raises(UserError, match=rf"films{suffix}: two columns are called `b`$"):
        user_table(path)


def test_a_table_that_compresses_well_is_read(tmp_path):
    rows = pd.DataFrame({"path": [f"film{i}.png" for i in range(100_000)], "label": 1})
    rows.to_csv(tmp_path / "films.csv.gz", index=False)
    assert len(user_table(tmp_path / "films.csv.gz")) == len(rows)
    assert source.header(str(tmp_path / "films.csv.gz")) == ["path", "label"]


@pytest.mark.usefixtures("no_memory_taken")
def test_a_parquet_of_billions_of_equal_cells_is_refused_by_its_row_count(tmp_path, monkeypatch):
    pq.write_table(pa.table({"path": np.zeros(1_000_000, np.int8)}), tmp_path / "films.parquet")
    monkeypatch.setattr(remote, "machine_memory", lambda: 4_000_000)
    with pytest.raises(UserError, match=r"1,000,000 rows x 1 columns need 8\.0 MB of memory or more, .* has 4\.0 MB"):
        user_table(tmp_path / "films.parquet")


def false_footers(whole: bytes):
    """Each byte of the footer's start changed, its length false, its row count false."""
    size = struct.unpack("<I", whole[-8:-4])[0]
    yield from (
        whole[:-8] + struct.pack("<I", false) + b"PAR1" for false in (0, 1, size - 1, size + 1, 2**31, 2**32 - 1)
    )
    start = len(whole) - 8 - size
    for at in range(start, start + min(size, 60)):
        yield whole[:at] + bytes([whole[at] ^ 0x7F]) + whole[at + 1 :]


@pytest.mark.usefixtures("no_memory_taken")
def test_a_parquet_with_a_false_footer_is_read_or_refused_by_its_name(tmp_path):
    file = io.BytesIO()
    pd.DataFrame({"path": ["a.png", "b.png"], "label": [0, 1]}).to_parquet(file)
    path = tmp_path / "films.parquet"
    refused = 0
    for data in false_footers(file.getvalue()):
        path.write_bytes(data)
        for read in (lambda: user_table(path), lambda: source.header(str(path))):
            try:
                read()
            except UserError as error:
                refused += 1
                assert "films.parquet" in str(error) and len(str(error).splitlines()) == 1
    assert refused > 20


# ---- films ----------------------------------------------------------------------------------------------------------
def png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *more, (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text)) for kind, text in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(scope="module")
def zeros() -> bytes:
    return zlib.compress(bytes(200_000_000), 1)


@pytest.mark.usefixtures("no_memory_taken")
@pytest.mark.parametrize(
    ("size", "more"),
    [
        ((60_000, 60_000), None),
        ((2**31 - 1, 2**31 - 1), None),
        ((64, 64), None),  # more data than the picture has
        ((64, 64), b"zTXt"),
        ((64, 64), b"iCCP"),
    ],
    ids=["large", "largest", "more data", "text", "profile"],
)
def test_a_png_bomb_is_set_aside(tmp_path, zeros, size, more):
    extra = [] if more is None else [(more, b"a\0\0" + zeros)]
    (tmp_path / "film.png").write_bytes(png(*size, zeros if more is None else zlib.compress(bytes(65 * 64)), *extra))
    with pytest.raises(BadFilm):
        decode(tmp_path / "film.png")


def test_a_pipe_and_a_device_are_no_films_and_no_tables(tmp_path):
    os.mkfifo(tmp_path / "film.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(tmp_path / "real.png")
    assert len(films_of(str(tmp_path))[0]) == 3
    for name in ("film.png", "zero.png"):
        with pytest.raises(BadFilm, match="not a regular file"):
            decode(tmp_path / name)
    assert decode(tmp_path / "real.png").shape == (64, 64)
    os.mkfifo(tmp_path / "films.csv")
    for path in (tmp_path / "films.csv", "/dev/zero"):
        with pytest.raises(UserError, match="a pipe or device; wanted a regular file"):
            user_table(path)
    with pytest.raises(UserError, match=r"films\.csv: no such folder or file"):
        films_of(str(tmp_path / "films.csv"))
