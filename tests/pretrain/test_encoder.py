"""Encoders: timm's numbers, dropped tokens are not computed, weights load elsewhere."""

import json
import os
import re
import resource

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from configs import UserError
from configs.cli import guard
from pretrain import encoder as enc
from pretrain.encoder.preprocess import Preprocess
from pretrain.store.decode import Square

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def tiny(**more):
    torch.manual_seed(0)
    return enc.create("vit_tiny_patch16_224", image_size=64, model_args=TINY, **more)


@pytest.mark.parametrize(
    "arch, size, args",
    [
        ("vit_tiny_patch16_224", 64, TINY),
        ("vit_small_patch14_dinov2", 56, {"depth": 2}),  # layer scale
        ("vit_small_patch14_reg4_dinov2", 56, {"depth": 2}),  # registers, positions of patches only
        ("vit_small_patch14_dinov2", 448, {"depth": 1}),
        ("vit_small_patch16_224", 512, {"depth": 1}),
        ("vit_base_patch16_224", 224, {"depth": 1}),
        ("densenet121", 64, {}),
        ("resnet34", 64, {}),
    ],
)
def test_gives_what_timm_gives_and_loads_there_strictly(tmp_path, arch, size, args):
    torch.manual_seed(0)
    encoder = enc.create(arch, image_size=size, model_args=args).eval()
    folder = enc.save(tmp_path / "encoder", encoder, {"step": 1})
    meta = json.loads((folder / "encoder.json").read_text())
    net = timm.create_model(meta["arch"], num_classes=0, in_chans=meta["in_chans"], **meta["model_args"]).eval()
    net.load_state_dict(load_file(folder / "encoder.safetensors"))
    x = torch.randn(2, 1, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.features(x), net.forward_features(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder(x), net(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(enc.load(folder)(x), encoder(x))


def test_smaller_views_get_timms_interpolated_positions():
    encoder = tiny().eval()
    x = torch.randn(2, 1, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.features(x), encoder.net.forward_features(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [24, 30])
def test_sincos_positions_are_sines_and_cosines_of_row_then_column(width):
    args = {**TINY, "embed_dim": width}
    net = enc.create("vit_tiny_patch16_224", image_size=64, model_args=args, positions="sincos").net
    rates, (row, column) = 10000 ** (-np.arange(6 if width == 24 else 7) / (width // 4)), (2, 3)
    wanted = [f(place * rates) for place in (row, column) for f in (np.sin, np.cos)]
    found = net.pos_embed[0, 1 + row * 4 + column].detach().numpy()
    np.testing.assert_allclose(found[: width // 4 * 4], np.concatenate(wanted), atol=1e-6)


def test_dropped_patches_do_not_matter_and_are_not_computed():
    encoder = tiny().eval()
    keep = torch.tensor([[0, 5, 7], [3, 5, 15]])
    x = torch.randn(2, 1, 64, 64)
    changed = x.clone()
    changed[0, :, 0:16, 16:32] = 9.0  # patch 1, which film 0 drops
    changed[0, :, 48:64, 48:64] = 9.0  # patch 15: the bottom right one, dropped here, kept by film 1
    with torch.inference_mode():
        tokens = encoder.features(x, keep)
        assert tokens.shape == (2, 1 + 3, 24)
        torch.testing.assert_close(encoder.features(changed, keep), tokens)
        changed[1, :, 48:64, 48:64] = 9.0
        assert not torch.allclose(encoder.features(changed, keep)[1], tokens[1])


def test_keeping_all_patches_is_no_mask():
    encoder = tiny().eval()
    x = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x, keep=torch.arange(16).repeat(2, 1)), encoder(x))


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        encoder = tiny()
        encoder.checkpointing = checkpointing
        encoder(torch.ones(2, 1, 64, 64)).square().sum().backward()
        gradients.append(encoder.net.blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_pools():
    encoder = tiny().eval()
    x = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        tokens = encoder.features(x)
        torch.testing.assert_close(encoder(x), tokens[:, 0])
        torch.testing.assert_close(encoder(x, "avg"), tokens[:, 1:].mean(dim=1))
        with pytest.raises(UserError, match="pool `max`"):
            encoder(x, "max")


def test_embed_reads_preprocess_from_the_folder(tmp_path):
    films = np.random.default_rng(0).integers(0, 255, (3, 80, 80), dtype=np.uint8)
    features = {}
    for mode in ("crop", "dataset"):
        encoder = tiny(preprocess=Preprocess(64, normalise=mode, mean=0.3, std=0.2))
        folder = enc.save(tmp_path / mode, encoder)
        features[mode] = enc.embed(folder, films, batch_size=2)
        assert features[mode].shape == (3, encoder.width)
        torch.testing.assert_close(enc.embed(encoder, films), features[mode])
    assert not torch.allclose(features["crop"], features["dataset"])


def test_black_film_is_finite_and_padding_keeps_the_whole_film():
    preprocess = Preprocess(32)
    assert torch.isfinite(preprocess(np.zeros((1, 40, 30), np.uint8))).all()
    film = np.zeros((64, 32), np.uint8)
    film[-2:, :] = 255  # the costophrenic angles are at the bottom
    assert preprocess(film)[0, 0, -1].max() > preprocess(film)[0, 0, 0].max()


@pytest.mark.parametrize("store", [None, Square(48), Square(64, "window", "jpeg")], ids=str)
@pytest.mark.parametrize("normalise", ["crop", "film", "dataset"])
def test_encoder_json_holds_the_whole_way_from_film_to_input(tmp_path, store, normalise):
    preprocess = Preprocess(32, normalise, 0.4 if normalise == "dataset" else 0.5, store=store)
    again = enc.load(enc.save(tmp_path / "encoder", enc.create("resnet10t", preprocess=preprocess, image_size=32)))
    assert again.preprocess == preprocess
    assert "store" in again.meta["preprocess"] or store is None


@pytest.mark.parametrize(
    "change, says",
    [
        ({"interpolation": "bicubic"}, "`interpolation` is 'bicubic'"),
        ({"pad": "white"}, "`pad` is 'white'"),
        ({"std_added": 0.0}, "`std_added` is 0.0"),
        ({"normalise": "z-score"}, "`preprocess.normalise`: got the text 'z-score'"),
        ({"resize": "large"}, "`preprocess.resize`: got the text 'large'"),
        ({"store": {"resize": 48, "dicom": "mimic-jpg", "enlarge": "nearest"}}, "preprocess.store: `enlarge`"),
        ({"store": {"resize": 48, "dicom": "mimic-jpg", "decode_at_least": 48}}, "`decode_at_least` is 48"),
        ({"store": {"dicom": "mimic-jpg"}}, "`preprocess.store.resize` is missing"),
    ],
    ids=str,
)
def test_a_way_that_this_version_does_not_go_is_refused(tmp_path, change, says):
    folder = enc.save(tmp_path / "encoder", tiny())
    meta = json.loads((folder / "encoder.json").read_text())
    meta["preprocess"] |= change
    (folder / "encoder.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=re.escape(says)):
        enc.load(folder)


def test_an_older_encoder_json_is_read_and_its_lack_is_named(tmp_path):
    film = np.random.default_rng(0).integers(0, 255, (80, 60), dtype=np.uint8)
    Image.fromarray(film).save(tmp_path / "film.png")
    encoder = tiny().eval()
    folder = enc.save(tmp_path / "encoder", encoder)  # without a store, encoder.json is that of version 0.2.0
    with pytest.warns(UserWarning, match=r"encoder: encoder\.json lacks preprocess\.store"):
        features = enc.embed(folder, [tmp_path / "film.png"])
    padded = np.pad(film, ((0, 0), (10, 10)))
    torch.testing.assert_close(features, enc.embed(encoder, padded))


def test_features_that_are_not_finite_name_the_encoder_and_the_first_film(tmp_path):
    encoder = tiny().eval()
    with torch.no_grad():
        encoder.net.norm.weight.fill_(3e38)
    films = np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8)
    with pytest.raises(
        UserError, match=r"vit_tiny_patch16_224: features that are not finite or above 1e19, of film number 0 and 2"
    ):
        enc.embed(encoder, films)
    with pytest.raises(UserError, match=r"film left\.png and 0 more"):
        enc.embed(encoder, films[:1], names=["left.png"])


def test_floats_are_refused():
    with pytest.raises(UserError, match="uint8"):
        Preprocess(32)(np.full((1, 32, 32), np.nan, np.float32))


@pytest.mark.parametrize(
    "break_it, says",
    [
        (lambda f: (f / "encoder.json").unlink(), "not an encoder folder"),
        (lambda f: (f / "encoder.json").write_text('{"arch": "resnet34"}'), "`model_args` is missing"),
        (lambda f: (f / "encoder.safetensors").unlink(), "incomplete"),
        (lambda f: (f / "encoder.safetensors").write_bytes(b"no"), "damaged"),
        (
            lambda f: (f / "encoder.json").write_text(
                (f / "encoder.json").read_text().replace('"depth": 2', '"depth": 3')
            ),
            "missing, e.g. blocks.2",
        ),
    ],
)
def test_a_broken_folder_is_refused_by_name(tmp_path, break_it, says):
    folder = enc.save(tmp_path / "encoder", tiny())
    break_it(folder)
    with pytest.raises(UserError, match=says):
        enc.load(folder)


@pytest.mark.parametrize(
    "arch, says",
    [
        ("vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("crossvit_tiny_240", "neither tokens nor a map|does not take films of 224 px"),
    ],
)
def test_other_architectures_are_refused(arch, says):
    with pytest.raises(UserError, match=says):
        enc.create(arch)


@pytest.mark.parametrize(
    "arch, args",
    [
        ("vit_base_patch16_siglip_224", {"depth": 1}),  # no class token, learned pooling
        ("vit_medium_patch16_gap_256", {"depth": 1}),  # no class token, mean
        ("vit_medium_patch16_reg4_gap_256", {"depth": 1}),
        ("vit_tiny_patch16_224", {"depth": 1, "global_pool": "avg"}),  # norm after the mean
        ("vit_base_patch16_clip_224", {"depth": 1}),
        ("deit3_small_patch16_224", {"depth": 1}),
        ("flexivit_small", {"depth": 1}),
    ],
)
def test_any_vit_pools_as_timm_does_and_trains_every_weight(arch, args):
    torch.manual_seed(0)
    encoder = enc.create(arch, image_size=64, model_args=args)
    encoder(torch.randn(2, 1, 32, 32)).square().sum().backward()
    assert [name for name, p in encoder.net.named_parameters() if p.grad is None] == []
    x = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.eval()(x), encoder.net(x), rtol=1e-4, atol=1e-5)
        assert encoder.features(x, torch.zeros(2, 3, dtype=torch.long)).shape[1] == 3 + encoder.net.num_prefix_tokens


def test_a_pool_that_the_network_lacks_is_refused_at_once():
    with pytest.raises(UserError, match=r"pool `max`.*cls, avg"):
        tiny(pool="max")


@pytest.mark.parametrize("arch", ["densenet121", "resnet50"])
def test_recomputing_activations_changes_no_gradient_of_a_convolutional_net(arch):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = enc.create(arch, image_size=32)
        encoder.checkpointing = checkpointing
        calls = []
        last = encoder.net.features.norm5 if arch == "densenet121" else encoder.net.layer4
        inner = encoder.net.features.denseblock1.denselayer2.norm1 if arch == "densenet121" else last[0].bn1
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        encoder(torch.linspace(0, 1, 4 * 32 * 32).view(4, 1, 32, 32)).square().sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad for p in encoder.parameters()])
    torch.testing.assert_close(*gradients)


def test_timms_long_errors_are_cut_to_a_line():
    with pytest.raises(UserError, match=r"timm cannot make .* linspace\(\)") as error:
        enc.create("vit_tiny_patch16_224", model_args={"depth": True})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[], [32], [[1]], "x", {"a": 1}, 0, -1, 1e300])
@pytest.mark.parametrize("key", ["img_size", "patch_size", "embed_dim", "norm_layer", "reg_tokens"])
def test_arguments_of_any_kind_make_a_network_or_are_refused(key, value):
    try:
        enc.create(
            "vit_tiny_patch16_224", image_size=32, model_args={"depth": 1, "embed_dim": 24, "num_heads": 1, key: value}
        )
    except UserError as error:
        assert "timm has no" not in str(error) and "\n" not in str(error)


def test_an_encoder_that_timm_does_not_have_is_refused_by_its_file(tmp_path):
    folder = enc.save(tmp_path / "encoder", tiny(), {"step": 1})
    about = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(about | {"arch": "x7"}))
    with pytest.raises(UserError, match=r"encoder\.json: .*no `x7`"):
        enc.load(folder)


def test_an_encoder_whose_files_changed_is_loaded_with_a_warning(tmp_path, capsys):
    folder = enc.save(tmp_path / "encoder", tiny(), {"step": 1})
    enc.load(folder)
    assert "changed" not in capsys.readouterr().err
    state = load_file(folder / "encoder.safetensors")
    save_file({key: value + 1 for key, value in state.items()}, folder / "encoder.safetensors")
    (folder / "encoder.json").write_text((folder / "encoder.json").read_text().replace('"step": 1', '"step": 2'))
    enc.load(folder)
    told = [line.split(": changed")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == [f"warning: {folder}/encoder.{suffix}" for suffix in ("json", "safetensors")]


def test_a_full_disk_while_exporting_keeps_the_encoder_before(tmp_path):
    enc.save(tmp_path / "encoder", tiny(), {"step": 1})
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # threads do not survive a fork
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        os._exit(guard(lambda: (enc.save(tmp_path / "encoder", tiny(), {"step": 2}), 0)[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert enc.load(tmp_path / "encoder").meta["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["encoder"]


STAGED = [("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}, 80), ("vit_tiny_patch16_224", TINY, None)]


@pytest.mark.parametrize(("arch", "args", "width"), STAGED, ids=[arch for arch, *_ in STAGED])
def test_stages_are_the_means_of_the_last_four_maps(arch, args, width):
    encoder, x = enc.create(arch, image_size=64, model_args=args).eval(), torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        stages = encoder(x, pool="stages")
        torch.testing.assert_close(stages[:, -encoder.width :], encoder(x, pool="avg"))
        if width is not None:
            net = encoder.net
            first = net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x)))))
            torch.testing.assert_close(stages[:, :8], first.mean(dim=(2, 3)))
    assert stages.shape == (2, width or encoder.width * min(4, len(encoder.net.blocks)))
    assert encoder.pools[0] != "stages"  # never an encoder's own


def test_a_network_without_stages_is_named():
    encoder = tiny()
    encoder.net.forward_intermediates = None
    with pytest.raises(UserError, match=r"stages.*vit_tiny_patch16_224"):
        encoder(torch.randn(1, 1, 64, 64), pool="stages")
