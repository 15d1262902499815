"""Starting from others' weights: the same numbers, or a refusal that names what differs."""

import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from configs import UserError
from pretrain import encoder as enc
from pretrain.encoder.weights import start_from

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def tiny(in_chans: int = 1, **args):
    return enc.create("vit_tiny_patch16_224", image_size=32, in_chans=in_chans, model_args={**TINY, **args})


def torchvision_vit() -> torch.nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=96, num_classes=5
    )


def test_a_torchvision_vit_gives_the_same_features(tmp_path):
    theirs = torchvision_vit().eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = tiny(in_chans=3).eval()
    said = start_from(ours, tmp_path / "vit.pth", heads=2)
    assert "classifier (heads.head.bias, heads.head.weight) left out" in said
    theirs.heads = torch.nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["densenet121", "resnet34"])
def test_torchvision_convolutional_nets_give_the_same_features(tmp_path, arch):
    theirs = getattr(torchvision.models, arch)(num_classes=5).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = enc.create(arch, in_chans=3, image_size=64).eval()
    start_from(ours, tmp_path / "w.safetensors")
    setattr(theirs, "classifier" if arch == "densenet121" else "fc", torch.nn.Identity())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_colour_weights_see_a_gray_film_as_its_three_copies(tmp_path):
    colour = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **TINY).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in colour.state_dict().items()}}, tmp_path / "w.pth")
    gray = tiny().eval()
    assert "from 3 to 1 channels" in start_from(gray, tmp_path / "w.pth", heads=2)
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        features = colour.forward_features(x.expand(-1, 3, -1, -1))
        torch.testing.assert_close(gray.features(x), features, rtol=1e-4, atol=1e-5)


def test_an_earlier_run_is_taken_as_it_is(tmp_path):
    earlier = tiny()
    enc.save(tmp_path / "run/encoder", earlier)
    later = tiny()
    start_from(later, tmp_path / "run")
    for key, value in earlier.net.state_dict().items():
        assert torch.equal(later.net.state_dict()[key], value), key


@pytest.mark.parametrize(
    "made, says",
    [
        (lambda: enc.create("vit_tiny_patch16_224", image_size=64, model_args=TINY), "image_size 32 there, 64 in this"),
        (lambda: tiny(num_heads=3), "'num_heads': 2"),
        (lambda: enc.create("resnet34", image_size=32), "arch vit_tiny_patch16_224 there"),
    ],
)
def test_an_encoder_of_another_network_is_refused(tmp_path, made, says):
    enc.save(tmp_path / "encoder", tiny())
    with pytest.raises(UserError, match=says):
        start_from(made(), tmp_path / "encoder")


def test_a_bare_vit_needs_its_heads_and_the_right_number(tmp_path):
    torch.save(torchvision_vit().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="init_heads"):
        start_from(tiny(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="this config makes 2 heads"):
        start_from(tiny(), tmp_path / "vit.pth", heads=6)


def test_missing_keys_are_named(tmp_path):
    state = torchvision_vit().state_dict()
    del state["encoder.ln.bias"]
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"1 missing, e\.g\. norm\.bias"):
        start_from(tiny(), tmp_path / "vit.pth", heads=2)


def test_positions_of_another_size_come_with_what_to_set(tmp_path):
    torch.save(torchvision_vit().state_dict(), tmp_path / "vit.pth")  # of 32 px
    larger = enc.create("vit_tiny_patch16_224", image_size=64, model_args=TINY)
    with pytest.raises(UserError, match=r"encoder\.model_args: \{img_size: 32\}"):
        start_from(larger, tmp_path / "vit.pth", heads=2)
    larger = enc.create("vit_tiny_patch16_224", image_size=64, model_args={**TINY, "img_size": 32})
    start_from(larger, tmp_path / "vit.pth", heads=2)
    assert larger(torch.zeros(1, 1, 64, 64)).shape == (1, 24)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    state = torchvision_vit().state_dict()
    state["encoder.ln.bias"][3] = torch.nan
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"not a number in 1 tensors, e\.g\. norm\.bias"):
        start_from(tiny(), tmp_path / "vit.pth", heads=2)


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_files_that_are_no_weights_are_refused(tmp_path, content):
    path = tmp_path / "w.pth"
    if content is None:
        torch.save({"epoch": 3}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth"):
        start_from(tiny(), path, heads=2)


def test_old_torchvision_files_have_other_names_and_no_batch_counters(tmp_path):
    theirs = torchvision.models.densenet121(num_classes=5).eval()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value
        for key, value in theirs.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    ours = enc.create("densenet121", in_chans=3, image_size=64).eval()
    start_from(ours, tmp_path / "densenet121.pth")
    theirs.classifier = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
