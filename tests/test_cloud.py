"""Tables and films in buckets: the same features and store as from local folders; network errors."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests import forked

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # the emulator speaks no gRPC
gcsfs = pytest.importorskip("gcsfs", reason="needs gcsfs (extra `dev` or `cloud`)")
emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator (extra `dev`)")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "demo"
TABLES, FILMS = "own-tables", "films-of-physionet"  # the second lets the reader pay
PROJECT = "my-project"
Answer = tuple[int, dict[str, Any]] | str | None  # a status with its JSON, `cut`, or None: pass on


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the emulator, unless a rule answers them. `rule(bucket, object, query, count)`."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.rule: Callable[[str, str, dict[str, str], int], Answer] = lambda *_: None
        self.counts: dict[str, int] = {}  # requests by object
        self.read: dict[str, int] = {}  # of its content
        self.busy, self.most, self.lock = 0, 0, threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that disconnects is not a fault."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parsed = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(parsed.query))
        _, _, rest = parsed.path.partition("/b/")
        bucket, _, name = rest.partition("/o")
        name = urllib.parse.unquote(name.lstrip("/")) or query.get("prefix", "")
        with self.server.lock:
            count = self.server.counts[name] = self.server.counts.get(name, 0) + 1
            if query.get("alt") == "media":
                self.server.read[name] = self.server.read.get(name, 0) + 1
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        try:
            self._answer(self.server.rule(bucket, name, query, count))
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def _answer(self, answer: Answer) -> None:
        if answer == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half of it")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if isinstance(answer, tuple):
            return self._send(
                answer[0], json.dumps({"error": answer[1]}).encode(), {"Content-Type": "application/json"}
            )
        passed = {k: v for k, v in self.headers.items() if k.lower() in ("range", "accept")}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.server.upstream + self.path, headers=passed)
            ) as got:
                return self._send(got.status, got.read(), dict(got.headers))
        except urllib.error.HTTPError as error:
            self._send(error.code, error.read(), dict(error.headers))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


SHORT_WAITS = """
import asyncio, runpy, sys
whole = asyncio.sleep
asyncio.sleep = lambda seconds, *more: whole(seconds / 20, *more)  # gcsfs waits 31 s for six tries
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(words: list[object], cwd: Path, code: int = 0) -> str:
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    env = os.environ | own | {"OMP_NUM_THREADS": "1", "GOOGLE_APPLICATION_CREDENTIALS": "", "NO_GCE_CHECK": "true"}
    done = forked.run(["-c", SHORT_WAITS, *words], cwd, env, timeout=300)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert code == 0 or "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    house = tmp_path_factory.mktemp("cloud")
    run(["ehr_features", "demo", house / "data", "--subjects", 50, "--seed", 5], house)
    return house


@pytest.fixture(scope="module")
def bucket_server(house: Path) -> Iterator[str]:
    """The emulator, holding the tables in one bucket and the films, with their tables, in another."""
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True)
    server.start()
    url = f"http://127.0.0.1:{port}"
    cloud = gcsfs.GCSFileSystem(endpoint_url=url, token="anon", project=PROJECT, skip_instance_cache=True)
    for bucket, folder in ((TABLES, house / "data/mimic-iv"), (FILMS, house / "data/mimic-cxr")):
        cloud.mkdir(bucket)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            cloud.pipe_file(f"{bucket}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    yield url
    server.stop()


@pytest.fixture
def proxy(bucket_server: str) -> Iterator[Proxy]:
    proxy = Proxy(bucket_server)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def storage(proxy: Proxy, **options: object) -> str:
    given = {"endpoint_url": proxy.url, "token": "anon", "requester_pays": PROJECT} | options
    return "storage={gs: {" + ", ".join(f"{k}: {v}" for k, v in given.items() if v is not None) + "}}"


def reader_pays(bucket: str, name: str, query: dict[str, str], count: int) -> Answer:
    if bucket == FILMS and query.get("userProject") != PROJECT:
        return 400, {"message": "Bucket is a requester pays bucket but no user project provided."}
    return None


def build(proxy: Proxy, house: Path, out: Path, *more: object, code: int = 0, **options: object) -> str:
    roots = [f"mimic_iv=gs://{TABLES}", f"mimic_cxr=gs://{FILMS}", f"out={out}", storage(proxy, **options)]
    return run(["ehr_features", "build", CONFIGS / "features.yaml", *roots, *more], house, code)


def pack(proxy: Proxy, house: Path, out: Path, *more: object, code: int = 0, **options: object) -> str:
    words = [f"mimic_cxr=gs://{FILMS}", f"out={out}", "workers=1", storage(proxy, **options)]
    return run(["pretrain", "images", CONFIGS / "images.yaml", *words, *more], house, code)


def same_table(a: Path, b: Path) -> None:
    pd.testing.assert_frame_equal(pd.read_parquet(a), pd.read_parquet(b))


@pytest.mark.slow
def test_two_buckets_give_the_features_of_local_folders(proxy: Proxy, house: Path, tmp_path: Path) -> None:
    proxy.rule = reader_pays
    build(proxy, house, tmp_path / "cloud")
    roots = [f"mimic_{name}={house / 'data' / f'mimic-{name}'}" for name in ("iv", "cxr")]
    run(["ehr_features", "build", CONFIGS / "features.yaml", *roots, f"out={tmp_path / 'local'}"], house)
    for name in ("images", "stays", "stay_films", "samples/mortality"):
        same_table(tmp_path / f"cloud/{name}.parquet", tmp_path / f"local/{name}.parquet")
    assert (tmp_path / "cloud/series.safetensors").read_bytes() == (tmp_path / "local/series.safetensors").read_bytes()
    first = dict(proxy.read)
    assert "up to date" in build(proxy, house, tmp_path / "cloud")
    assert first["icu/chartevents.csv.gz"] > 1, "a header and the rows"
    again = {name: n - first[name] for name, n in proxy.read.items() if n - first[name] > 1}
    assert not again, f"the second run read more than headers: {again}"


@pytest.mark.slow
def test_films_are_streamed_into_the_same_store_with_few_at_a_time(proxy: Proxy, house: Path, tmp_path: Path) -> None:
    proxy.rule = reader_pays
    pack(proxy, house, tmp_path / "cloud")
    local = [f"mimic_cxr={house / 'data/mimic-cxr'}", f"out={tmp_path / 'local'}", "workers=1"]
    run(["pretrain", "images", CONFIGS / "images.yaml", *local], house)
    same_table(tmp_path / "cloud/index.parquet", tmp_path / "local/index.parquet")
    hashes = [json.loads((tmp_path / side / "store.json").read_text())["hash"] for side in ("cloud", "local")]
    assert hashes[0] == hashes[1]
    assert 1 < proxy.most <= 64, f"{proxy.most} requests at a time"


@pytest.mark.slow
def test_a_bad_minute_is_retried_and_costs_nothing(proxy: Proxy, house: Path, tmp_path: Path) -> None:
    def rule(bucket: str, name: str, query: dict[str, str], count: int) -> Answer:
        if name.endswith(".jpg") and count == 1:
            code = sum(name.encode()) % 40  # some films, each once
            if code in (1, 2):
                return (429 if code == 1 else 503), {"message": "slow down"}
            if code == 3:
                return "cut"
        return reader_pays(bucket, name, query, count)

    proxy.rule = rule
    pack(proxy, house, tmp_path / "store")
    assert len(pd.read_parquet(tmp_path / "store/rejected.parquet")) == _bad_films(house)
    assert any(n > 1 for name, n in proxy.counts.items() if name.endswith(".jpg"))


@pytest.mark.slow
def test_tables_are_read_through_a_bad_minute_and_a_cut_one_is_never_taken_for_whole(
    proxy: Proxy, house: Path, tmp_path: Path
) -> None:
    forever = False

    def rule(bucket: str, name: str, query: dict[str, str], count: int) -> Answer:
        if query.get("alt") == "media" and (proxy.read[name] == 1 or (forever and "chartevents" in name)):
            kinds: list[Answer] = [(429, {"message": "slow down"}), (503, {"message": "busy"}), "cut"]
            return "cut" if "chartevents" in name else kinds[sum(name.encode()) % 3]
        return reader_pays(bucket, name, query, count)

    proxy.rule = rule
    build(proxy, house, tmp_path / "cloud")
    roots = [f"mimic_{name}={house / 'data' / f'mimic-{name}'}" for name in ("iv", "cxr")]
    run(["ehr_features", "build", CONFIGS / "features.yaml", *roots, f"out={tmp_path / 'local'}"], house)
    same_table(tmp_path / "cloud/images.parquet", tmp_path / "local/images.parquet")
    assert (tmp_path / "cloud/series.safetensors").read_bytes() == (tmp_path / "local/series.safetensors").read_bytes()
    forever = True
    text = build(proxy, house, tmp_path / "other", code=2)
    assert "chartevents" in text and "run the same command again" in text and len(text.splitlines()) < 6
    assert not (tmp_path / "other").exists()


def _bad_films(house: Path) -> int:
    """Films that are absent or damaged in the synthetic hospital itself."""
    out = house / "store"
    if not out.exists():
        run(
            ["pretrain", "images", CONFIGS / "images.yaml", f"mimic_cxr={house / 'data/mimic-cxr'}", f"out={out}"],
            house,
        )
    return len(pd.read_parquet(out / "rejected.parquet"))


@pytest.mark.slow
def test_an_absent_object_is_set_aside_with_its_reason(proxy: Proxy, house: Path, tmp_path: Path) -> None:
    gone = sorted((house / "data/mimic-cxr/files").rglob("*.jpg"))[0].name

    def rule(bucket: str, name: str, query: dict[str, str], count: int) -> Answer:
        missing = (404, {"message": "No such object"})
        return missing if Path(name).stem == Path(gone).stem else reader_pays(bucket, name, query, count)

    proxy.rule = rule
    pack(proxy, house, tmp_path / "store")
    rejected = pd.read_parquet(tmp_path / "store/rejected.parquet").set_index("dicom_id")
    assert rejected.loc[Path(gone).stem, "reason"] == "absent"


@pytest.mark.slow
def test_a_storage_that_stays_down_stops_the_packing_and_the_same_command_goes_on(
    proxy: Proxy, house: Path, tmp_path: Path
) -> None:
    down = True

    def rule(bucket: str, name: str, query: dict[str, str], count: int) -> Answer:
        broken = down and name.endswith(".jpg")
        return (400, {"message": "backend broken"}) if broken else reader_pays(bucket, name, query, count)

    proxy.rule = rule
    text = pack(proxy, house, tmp_path / "store", code=2)
    assert "run the same command again" in text and not (tmp_path / "store/store.json").exists()
    down = False
    pack(proxy, house, tmp_path / "store")
    assert len(pd.read_parquet(tmp_path / "store/rejected.parquet")) == _bad_films(house)


@pytest.mark.slow
def test_without_a_project_the_message_names_the_key(proxy: Proxy, house: Path, tmp_path: Path) -> None:
    proxy.rule = reader_pays
    for step in (build, pack):
        text = step(proxy, house, tmp_path / "out", code=2, requester_pays=None)
        assert "storage.gs.requester_pays=PROJECT" in text and len(text.splitlines()) < 12
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.parquet"))


@pytest.mark.slow
def test_without_credentials_the_message_says_how_to_get_them(proxy: Proxy, house: Path, tmp_path: Path) -> None:
    proxy.rule = lambda *_: (401, {"message": "Anonymous caller does not have storage.objects.get access"})
    for step in (build, pack):
        text = step(proxy, house, tmp_path / "out", code=2)
        assert "application-default login" in text and "storage.gs.token=FILE" in text
    proxy.rule = lambda *_: (403, {"message": "user does not have storage.objects.get access"})
    assert "does your account have access" in build(proxy, house, tmp_path / "out", code=2)
    text = build(proxy, house, tmp_path / "out", code=2, token=tmp_path / "key.json")
    assert f"storage.gs.token={tmp_path}/key.json: no such file" in text


@pytest.mark.slow
def test_another_file_system_of_fsspec_works_the_same_way(house: Path, tmp_path: Path) -> None:
    """The memory file system exists in one process only: both steps run in it."""
    code = f"""
import fsspec
from configs import load
from ehr_features.build import build
from ehr_features.config import FeaturesConfig
from pretrain.config import ImagesConfig
from pretrain.store import pack
memory = fsspec.filesystem("memory")
memory.put({str(house / "data/mimic-iv")!r}, "/tables", recursive=True)
memory.put({str(house / "data/mimic-cxr")!r}, "/films", recursive=True)
roots = ["mimic_iv=memory://tables", "mimic_cxr=memory://films"]
build(load(FeaturesConfig, {str(CONFIGS / "features.yaml")!r}, [*roots, "out={tmp_path}/features"]))
pack(load(ImagesConfig, {str(CONFIGS / "images.yaml")!r}, [roots[1], "out={tmp_path}/store", "workers=1"]))
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = forked.run(["-c", code], env=env)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(tmp_path / "store/index.parquet")) > 50
