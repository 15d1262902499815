"""Exports opened by their own readers, model cards read by the hub's library, and pushes to a small local hub."""

import base64
import io
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard

from configs import UserError
from ehr_features.files import write_json
from pretrain import encoder as enc
from pretrain.__main__ import main
from pretrain.encoder.preprocess import Preprocess
from pretrain.export import export
from pretrain.export.card import NO_RESULTS, PHYSIONET

PAGE = Path(__file__).resolve().parents[2] / "docs/using_the_encoder.md"
SMALL = {
    "vit": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    "resnet": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
    "densenet": {"growth_rate": 4, "block_config": [1, 1, 1, 1]},
}


def rows() -> list[list[str]]:
    """The table of the page: example, timm, transformers, onnx, torchscript."""
    table = re.search(r"^\| exported, e\.g\..*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert table is not None
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def make(folder: Path, arch: str = "vit_tiny_patch16_224", *, card: str | None = None, meta=None, **options) -> Path:
    """A run folder whose encoder/ has random weights, all of them away from their initial zeros and ones."""
    args = next((v for k, v in SMALL.items() if arch.startswith(k)), {}) | options.pop("model_args", {})
    size = options.pop("image_size", 28 if "patch14" in arch else 32)
    encoder = enc.create(arch, image_size=size, model_args=args, **options)
    with torch.no_grad():
        for value in encoder.net.parameters():
            value.add_(0.05 * torch.randn_like(value))
    enc.save(folder / "encoder", encoder, {"method": "msn", "step": 5, **(meta or {})}, card=card)
    return folder


def films(encoder: enc.Encoder, number: int = 5) -> torch.Tensor:
    size = encoder.meta["image_size"]
    return torch.randn(number, encoder.meta["in_chans"], size, size)


@torch.inference_mode()
def opened(form: str, out: Path, x: torch.Tensor) -> torch.Tensor:
    """Features by the form's own reader, without our code."""
    if form == "timm":
        return timm.create_model(f"local-dir:{out}", pretrained=True).eval()(x)
    if form == "torchscript":
        return torch.jit.load(str(out / "encoder.pt"))(x)
    if form == "onnx":
        ort = pytest.importorskip("onnxruntime")
        return torch.from_numpy(ort.InferenceSession(str(out / "encoder.onnx")).run(None, {"views": x.numpy()})[0])
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(out).eval()(x).last_hidden_state[:, 0]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_each_row_of_the_table_of_exports_holds(row, tmp_path):
    arch, *cells = row
    torch.manual_seed(0)
    source = make(tmp_path / "run", arch)
    ours = enc.load(source)
    x = films(ours)
    with torch.inference_mode():
        expected = ours(x)
    for form, cell in zip(("timm", "transformers", "onnx", "torchscript"), cells, strict=True):
        if cell == "refused":
            with pytest.raises(UserError, match="Use --format timm"):
                export(source, tmp_path / form, form=form)
            assert not (tmp_path / form).exists()
            continue
        found = opened(form, export(source, tmp_path / form, form=form), x)
        if cell == "equal":
            assert torch.equal(found, expected), form
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=float(cell) * max(1, float(expected.abs().max())))


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("vit_tiny_patch16_224", {"pool": "avg"}),
        ("vit_tiny_patch16_224", {"in_chans": 3}),
        ("vit_tiny_patch16_224", {"model_args": {"reg_tokens": 2, "class_token": True}}),
        ("vit_tiny_patch16_224", {"pool": "cls", "model_args": {"global_pool": "avg"}}),
        ("resnet18", {"pool": "max"}),
        ("densenet121", {"pool": "max", "in_chans": 3}),
    ],
)
def test_timm_pools_as_the_encoder_does(arch, options, tmp_path):
    source = make(tmp_path / "run", arch, **options)
    ours = enc.load(source)
    x = films(ours, 3)
    with torch.inference_mode():
        expected = ours(x)
    for folder in (source / "encoder", export(source, tmp_path / "out")):  # encoder/ itself is a local-dir of timm too
        assert torch.equal(opened("timm", folder, x), expected)
    more = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=14).eval()  # to be tuned
    with torch.inference_mode():
        assert more(x).shape == (3, 14)
        assert torch.equal(more.forward_head(more.forward_features(x), pre_logits=True), expected)
    assert torch.equal(enc.load(tmp_path / "out").net.state_dict()[next(iter(ours.net.state_dict()))],
                       next(iter(ours.net.state_dict().values())))  # fmt: skip


def test_timm_reads_the_preprocessing_that_it_can_do(tmp_path):
    way = Preprocess(32, "dataset", mean=0.4, std=0.2)
    out = export(make(tmp_path / "run", in_chans=3, preprocess=way), tmp_path / "out")
    net = timm.create_model(f"local-dir:{out}", pretrained=True)
    given = timm.data.resolve_model_data_config(net)
    assert given["input_size"] == (3, 32, 32) and given["crop_pct"] == 1.0 and given["interpolation"] == "bilinear"
    assert tuple(given["mean"]) == (0.4,) * 3 and tuple(given["std"]) == (0.2,) * 3
    out = export(make(tmp_path / "own"), tmp_path / "out2")
    given = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{out}", pretrained=True))
    assert tuple(given["mean"]) == (0.0,) and tuple(given["std"]) == (1.0,)
    assert "x.std((1, 2, 3), True, correction=0) + 0.1" in (out / "README.md").read_text()


def test_transformers_says_what_does_not_fit(tmp_path):
    pytest.importorskip("transformers")
    for i, (args, words) in enumerate([
        ({"reg_tokens": 2}, "registers"), ({"qk_norm": True}, "norms of queries and keys"),
        ({"init_values": 0.1}, "layer scale"), ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"pre_norm": True}, "a norm before its blocks"), ({"act_layer": "gelu_tanh"}, "another MLP"),
        ({"global_pool": "avg"}, "no norm after its blocks"), ({"no_embed_class": True}, "no learned positions"),
    ]):  # fmt: skip
        with pytest.raises(UserError, match=words):
            export(make(tmp_path / f"run{i}", model_args=args), tmp_path / "out", form="transformers")


def test_transformers_reads_processor_and_pool(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = make(tmp_path / "run", pool="avg", model_args={"qkv_bias": False})
    out = export(source, tmp_path / "out", form="transformers")
    ours, processor = enc.load(source), transformers.AutoImageProcessor.from_pretrained(out)
    grey = torch.randint(0, 256, (1, 32, 32), dtype=torch.uint8)
    pixels = processor(grey, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, grey[None] / 255)
    x = films(ours)
    with torch.inference_mode():
        tokens = transformers.AutoModel.from_pretrained(out).eval()(x).last_hidden_state
        assert torch.equal(tokens, ours.features(x)) and torch.equal(tokens[:, 1:].mean(1), ours(x))
    assert "last_hidden_state[:, 1:].mean(1)" in (out / "README.md").read_text()


def probe(folder: Path, encoder: Path, **run) -> Path:
    row = {"split": "test", "label": "macro", "subset": "all", "metric": "auroc", "value": 0.71234, "low": 0.6}
    rows = [
        row | {"high": 0.8, "n": 31},
        row | {"split": "val", "value": 0.99},
        row | {"label": "Edema", "value": 0.98},
    ]
    about = {"task": "findings", "model": "linear", "encoder": str(encoder), **run}
    write_json(folder / "results.json", {"run": about, "rows": rows})
    return folder


def test_the_hub_reads_the_cards_header(tmp_path):
    source = make(tmp_path / "run", card=f"# A card\n\n{NO_RESULTS}\n", meta={"datasets": ["mimic-cxr"]})
    probe(tmp_path / "beside", source / "encoder")  # found without being named
    probe(tmp_path / "leaky", source, allow_leak=True)
    probe(tmp_path / "another", tmp_path / "elsewhere")
    out = export(source, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "other" and card.data.license_name == PHYSIONET["license_name"]
    assert card.data.datasets == ["mimic-cxr"] and card.data.library_name == "timm" and "chest-x-ray" in card.data.tags
    assert card.data.metrics == ["roc_auc"]
    assert [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split) for r in card.data.eval_results] == [
        ("roc_auc", 0.7123, "mimic-cxr", "test")
    ]
    assert "# A card" in card.text and "| auroc | 0.712 | 0.600 to 0.800 | 31 |" in card.text
    assert "0.99" not in card.content and "0.98" not in card.content


def test_a_card_without_results_or_mimic(tmp_path):
    for i, (trained, name, sets) in enumerate([
        (["nih-chest-x-rays"], "that-of-the-training-films", ["nih-chest-x-rays"]),
        ([], "that-of-the-training-films", None),
        (None, PHYSIONET["license_name"], None),  # an encoder of an earlier release without its run: it may be MIMIC
    ]):  # fmt: skip
        source = make(tmp_path / f"run{i}", meta={} if trained is None else {"datasets": trained})
        card = ModelCard.load(export(source, tmp_path / f"out{i}") / "README.md")
        assert card.data.license_name == name and card.data.datasets == sets
        assert card.data.eval_results is None and card.data.metrics is None


def test_a_probe_of_another_encoder_is_refused(tmp_path):
    source, other = make(tmp_path / "run"), make(tmp_path / "other")
    with pytest.raises(UserError, match=r"it measured .*other"):
        export(source, tmp_path / "out", probe=probe(tmp_path / "probe", other))
    with pytest.raises(UserError, match=r"no results.json"):
        export(source, tmp_path / "out", probe=tmp_path)


class Hub(BaseHTTPRequestHandler):
    """The few requests of a push: make a repository, ask how to send each file, commit them."""

    made: dict = {}
    files: dict = {}
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse:
            self.answer({"error": "no right to write there"}, 403)
        elif self.path == "/api/repos/create":
            self.made.update(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/my-lab/cxr"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            asked = [file["path"] for file in json.loads(body)["files"]]
            kept = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in asked]
            self.answer({"files": kept})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            where = f"http://{self.headers['Host']}/my-lab/cxr/commit/1"
            self.answer({"commitUrl": where, "commitOid": "1", "pullRequestUrl": None})
        else:
            self.answer({"error": f"no POST {self.path}"}, 404)

    def do_GET(self) -> None:
        self.answer({"error": "nothing there"}, 404)

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, in the place of the real one."""
    handler = type("OneHub", (Hub,), {"made": {}, "files": {}})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: HfApi(endpoint=where, token="hf_none"))
    yield handler
    server.shutdown()
    server.server_close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


PUSH = ["export", "RUN", "OUT", "--push", "my-lab/cxr"]


def command(words: list[str], source: Path, out: Path) -> int:
    with pytest.raises(SystemExit) as done:
        main([{"RUN": str(source), "OUT": str(out)}.get(word, word) for word in words])
    return int(done.value.code or 0)


@pytest.mark.parametrize("typed", ["", "yes\n", "I may share my-lab/other\n", "i may share my-lab/cxr\n", None])
def test_nothing_is_sent_without_the_typed_statement(typed, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("I may share my-lab/cxr\n") if typed is None else Terminal(typed))
    assert command(PUSH, make(tmp_path / "run"), tmp_path / "out") == 2
    assert hub.made == {} and hub.files == {} and not (tmp_path / "out").exists()
    assert "nothing was sent" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["typing", "flag"])
def test_a_push_sends_the_files_of_the_form_alone(by, hub, tmp_path, monkeypatch):
    source = make(tmp_path / "run")
    (source / "seen_subjects.parquet").write_bytes(b"10000032")
    monkeypatch.setattr(sys, "stdin", Terminal("I may share my-lab/cxr\n") if by == "typing" else io.StringIO())
    assert command([*PUSH, *(["--yes-i-may"] if by == "flag" else [])], source, tmp_path / "out") == 0
    assert hub.made["name"] == "cxr" and hub.made["organization"] == "my-lab"
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert sorted(hub.files) == ["README.md", "config.json", "encoder.json", "model.safetensors"]
    assert b"10000032" not in b"".join(hub.files.values())
    for name, data in hub.files.items():  # what arrived opens as what was exported
        (tmp_path / "arrived" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "arrived" / name).write_bytes(data)
    x = films(enc.load(source))
    with torch.inference_mode():
        assert torch.equal(opened("timm", tmp_path / "arrived", x), enc.load(tmp_path / "arrived")(x))
    assert 'hf-hub:my-lab/cxr"' in hub.files["README.md"].decode()


def test_a_refused_push_says_so(hub, tmp_path, capsys):
    hub.refuse = True
    assert command([*PUSH, "--yes-i-may"], make(tmp_path / "run"), tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "the hub did not take it" in said and "403" in said
    assert (tmp_path / "out/README.md").is_file()


def test_flags_of_a_push_that_make_no_sense(tmp_path, capsys):
    source = make(tmp_path / "run")
    assert command(["export", "RUN", "OUT", "--yes-i-may"], source, tmp_path / "out") == 2
    assert command(["export", "RUN", "OUT", "--push", "cxr", "--yes-i-may"], source, tmp_path / "out") == 2
    assert command(["export", "RUN", "OUT", "--push", "a/b/c", "--yes-i-may"], source, tmp_path / "out") == 2
    assert "wanted ORG/NAME" in capsys.readouterr().err and not (tmp_path / "out").exists()
