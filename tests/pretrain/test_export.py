"""Exports: the same features elsewhere; and the readability of the record at the end of a run."""

import importlib.util

import pytest
import timm
import torch
from safetensors.torch import load_file

from configs import UserError
from ehr_features.files import write_json
from pretrain import encoder as enc
from pretrain import run
from pretrain.export import NO_RESULTS, READABLE, _ridge, export
from tests import forked

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def source(tmp_path):
    """A run folder: target weights in encoder/, anchor weights in a checkpoint."""
    encoder = enc.create("vit_tiny_patch16_224", image_size=32, model_args=TINY)
    enc.save(
        tmp_path / "run/encoder",
        encoder,
        {"step": 5, "readability": {"sex_m": {"metric": "auroc", "value": 0.8, "chance": 0.5}}},
        card=f"1 channel(s)\nWeights: the target branch after 5 steps.\n{READABLE}\n{NO_RESULTS}",
    )
    (tmp_path / "run/checkpoints").mkdir()
    anchor = {f"anchor.net.{key}": value + 1 for key, value in encoder.net.state_dict().items()}
    run.save_checkpoint(tmp_path / "run", {"model": anchor}, 7)
    return tmp_path / "run"


def test_three_channels_see_a_gray_film_as_one_does(source, tmp_path):
    out = export(source, tmp_path / "colour", in_chans=3)
    one, three = enc.load(source / "encoder"), enc.load(out)
    card = (out / "MODEL_CARD.md").read_text()
    assert "3 channel(s)" in card and "from 1 to 3 channels" in card
    meta = enc.read_meta(out)
    net = timm.create_model(meta["arch"], num_classes=0, in_chans=3, **meta["model_args"]).eval()
    net.load_state_dict(load_file(out / "encoder.safetensors"))
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(three(x.expand(-1, 3, -1, -1)), one(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(x.expand(-1, 3, -1, -1)), one(x), rtol=1e-4, atol=1e-5)


def test_the_anchor_comes_from_the_checkpoint(source, tmp_path):
    out = export(source, tmp_path / "anchor", branch="anchor")
    target, anchor = enc.load(source / "encoder"), enc.load(out)
    torch.testing.assert_close(anchor.net.cls_token, target.net.cls_token + 1)
    assert anchor.meta["branch"] == "anchor" and anchor.meta["step"] == 7
    card = (out / "MODEL_CARD.md").read_text()
    assert "the anchor branch after 7 steps" in card and f"{READABLE} of the target branch\n" in card
    assert "readability" not in anchor.meta and "readability" in target.meta


def test_the_card_takes_the_probes_numbers(source, tmp_path):
    row = {"split": "test", "label": "macro", "subset": "all", "metric": "auroc", "value": 0.7, "low": 0.6, "high": 0.8}
    others = [row | {"split": "val", "value": 0.9}, row | {"label": "Edema", "value": 0.91}]
    results = {"run": {"task": "findings", "model": "linear"}, "rows": [row | {"n": 31}, *others]}
    write_json(tmp_path / "probe/results.json", results)
    card = (export(source, tmp_path / "out", probe=tmp_path / "probe") / "MODEL_CARD.md").read_text()
    assert "| auroc | 0.700 | 0.600 to 0.800 | 31 |" in card and "0.9" not in card and NO_RESULTS not in card


def test_what_cannot_be_exported_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="exists"):
        export(source, source)
    with pytest.raises(UserError, match="not an encoder folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint"):
        export(source / "encoder", tmp_path / "out", branch="anchor")


def test_onnx_says_what_to_install(source, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "onnx" in name else found(name, *a))
    with pytest.raises(UserError, match="pip install onnx"):
        export(source, tmp_path / "out", form="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the extra dev")
def test_onnx_gives_the_same_features(source, tmp_path):
    import onnxruntime

    out = tmp_path / "out"  # in its own process: the exporter's threads would keep later tests from forking
    done = forked.run(["pretrain", "export", str(source), str(out), "--format", "onnx"])
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(out / "encoder.onnx")
    x = torch.randn(3, 1, 32, 32)
    with torch.inference_mode():
        expected = enc.load(source / "encoder")(x)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"views": x.numpy()})[0]), expected, rtol=1e-3, atol=1e-4
    )


def test_ridge_is_the_closed_form_and_constant_columns_say_nothing():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=random).double() * 3 + 1
    x[:, 3] = 5
    y = x @ torch.tensor([[1.0, 0.0], [-2.0, 3.0], [0.0, 1.0], [7.0, 7.0]]).double() + torch.randn(
        300, 2, generator=random
    )
    z = (x - x[:200].mean(0)) / x[:200].std(0).clamp_min(1e-6)
    gram = z[:200].T @ z[:200] / 200 + 0.01 * torch.eye(4).double()
    weights = torch.linalg.solve(gram, z[:200].T @ (y[:200] - y[:200].mean(0)) / 200)
    torch.testing.assert_close(_ridge(x[:200], y[:200], x[200:]), z[200:] @ weights + y[:200].mean(0))
    assert _ridge(x[:200], y[:200, :1], x[200:]).shape == (100, 1)
