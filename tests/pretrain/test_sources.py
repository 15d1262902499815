"""Published encoders: features of the owner's own loader from the owner's own files, and what is said where that
fails. Each row of the tables in docs/using_the_encoder.md is a case here."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from configs import UserError
from pretrain import encoder as enc
from pretrain.encoder import hub, sources
from pretrain.encoder.weights import copy_state, load_weights

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2}
HIERARCHY = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 2, 3, 4)}

# ---- Architectures: name, size, arguments, whether patches are dropped.

ARCHS = [
    ("vit_tiny_patch16_224", 32, SMALL, True),
    ("vit_small_patch14_reg4_dinov2", 28, SMALL, True),  # registers
    ("eva02_tiny_patch14_224", 28, SMALL, True),  # EVA-02, EVA-X: rotary positions
    ("vit_small_patch16_dinov3", 32, SMALL, True),  # DINOv3: registers, rotary positions alone
    ("vit_small_patch16_rope_mixed_224", 32, SMALL, True),  # a rotation of its own in each block
    ("vit_pe_core_tiny_patch16_384", 32, SMALL, True),  # learned pooling
    ("convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, False),
    ("swin_tiny_patch4_window7_224", 32, HIERARCHY, False),
    ("swinv2_tiny_window8_256", 32, HIERARCHY, False),
    ("lcnet_035", 32, {}, False),  # EfficientNet's and MobileNet's family
    ("tinynet_e", 32, {}, False),
    ("regnetx_002", 32, {}, False),
    ("beit_base_patch16_224", 32, SMALL, False),  # relative positions: tokens, without dropping
    ("deit_tiny_distilled_patch16_224", 32, SMALL, False),
    ("vit_tiny_r_s16_p8_224", 32, {**SMALL, "patch_size": 1}, False),  # a convolutional stem
]


@pytest.mark.parametrize("arch, size, args, drops", ARCHS, ids=[row[0] for row in ARCHS])
def test_each_architecture_gives_timms_features_after_saving_and_trains(tmp_path, arch, size, args, drops):
    torch.manual_seed(0)
    encoder = enc.create(arch, image_size=size, model_args=args)
    assert encoder.is_vit is drops
    encoder(torch.randn(2, 1, size, size)).square().sum().backward()
    unused = [name for name, p in encoder.net.named_parameters() if p.grad is None]
    assert unused == [], unused
    folder = enc.save(tmp_path / "encoder", encoder.eval())
    meta, again = enc.read_meta(folder), enc.load(folder)
    net = timm.create_model(meta["arch"], num_classes=0, in_chans=1, **meta["model_args"]).eval()
    net.load_state_dict(again.net.state_dict())
    x = torch.randn(2, 1, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(again(x), net(x), rtol=0, atol=1e-5)
        assert again(x).shape == (2, again.width) and set(again.pools) >= {meta["pool"]}
        features = again.features(x)
        assert features.shape[1 if features.ndim == 4 else 2] == again.layout.channels
        for pool in again.pools:
            assert again(x, pool).shape == (2, again.width)


@pytest.mark.parametrize(
    "row", [row for row in ARCHS if row[3] and "tiny_patch16_224" not in row[0]], ids=lambda r: r[0]
)
def test_dropped_patches_leave_the_forward_of_a_network_that_never_had_them(row):
    """The reference: the whole network with all attention to the other patches forbidden, on the kept tokens."""
    arch, size, args, _ = row
    torch.manual_seed(0)
    size *= 2  # 16 patches
    encoder = enc.create(arch, image_size=size, model_args=args).eval()
    net, prefix = encoder.net, encoder.net.num_prefix_tokens
    keep = torch.tensor([[0, 5, 7, 14], [3, 4, 5, 15]])
    x = torch.randn(2, 1, size, size)
    seen = torch.cat([torch.arange(prefix).expand(2, -1), keep + prefix], dim=1)
    mask = torch.zeros(2, 1, 1, prefix + 16, dtype=torch.bool).index_put_(
        (torch.arange(2)[:, None], torch.tensor(0), torch.tensor(0), seen), torch.tensor(True)
    )
    mask = mask.expand(-1, -1, prefix + 16, -1)
    with torch.inference_mode():
        wanted = net.forward_features(x, attn_mask=torch.zeros(mask.shape).masked_fill(~mask, -torch.inf))
        wanted = wanted.gather(1, seen[:, :, None].expand(-1, -1, wanted.shape[2]))
        found = encoder.features(x, keep)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch, size, args, drops", ARCHS, ids=[row[0] for row in ARCHS])
def test_three_equal_channels_give_the_features_of_one(arch, size, args, drops):
    torch.manual_seed(0)
    one = enc.create(arch, image_size=size, model_args=args).eval()
    three = enc.create(arch, image_size=size, model_args=args, in_chans=3).eval()
    assert "from 1 to 3 channels" in copy_state(three, one.net.state_dict(), "", "")
    x = torch.randn(1, 1, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(three(x.expand(-1, 3, -1, -1)), one(x), rtol=0, atol=1e-5)


def test_a_network_without_one_tensor_of_features_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(timm.models.regnet.RegNet, "forward_features", lambda self, x: [x, x])
    with pytest.raises(UserError, match=r"regnetx_002.*a RegNet, which gives neither tokens nor a map"):
        enc.create("regnetx_002", image_size=32)


def test_a_size_that_does_not_fit_names_the_architecture():
    with pytest.raises(UserError, match="maxvit_pico_rw_256"):
        enc.create("maxvit_pico_rw_256", image_size=50)


# ---- Layouts of Hugging Face: the owner's loader is transformers.


def hugging_face(tmp_path, kind, **more):
    transformers = pytest.importorskip("transformers", reason="needs the extra `text`")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    sizes |= {"intermediate_size": 88} if "Dinov2" not in kind else {}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes | more)).eval()
    for name, value in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path / "hub")
    return model, tmp_path / "hub"


LAYOUTS = [
    ("ViT", {}),
    ("ViT", {"hidden_act": "gelu_new", "qkv_bias": False, "layer_norm_eps": 1e-3}),
    ("ViTMSN", {}),
    ("Dinov2", {"image_size": 28, "patch_size": 14}),
    ("Dinov2", {"image_size": 28, "patch_size": 14, "use_swiglu_ffn": True}),
    ("Dinov2WithRegisters", {"image_size": 28, "patch_size": 14, "num_register_tokens": 3}),
    ("DINOv3ViT", {"num_register_tokens": 4}),
    ("DINOv3ViT", {"query_bias": False, "value_bias": False}),
    ("DINOv3ViT", {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 90, "rope_theta": 50.0}),
]


@pytest.mark.parametrize("kind, more", LAYOUTS, ids=str)
def test_a_folder_of_hugging_face_gives_transformers_features(tmp_path, kind, more):
    model, folder = hugging_face(tmp_path, kind, **more)
    size = model.config.image_size
    stats = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    stats |= {"image_mean": [0.53, 0.52, 0.51], "image_std": [0.25, 0.26, 0.27]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stats))
    encoder = enc.load(folder)
    films = np.random.default_rng(0).integers(0, 255, (2, size, size), dtype=np.uint8)
    pixels = torch.from_numpy(films)[:, None].expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(stats[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    x = encoder.preprocess(films)
    torch.testing.assert_close(x, (pixels - mean) / std)
    with torch.inference_mode():
        wanted = model(x).last_hidden_state
        torch.testing.assert_close(encoder.features(x), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder(x), wanted[:, 0], rtol=0, atol=1e-5)
    again = enc.load(enc.save(tmp_path / "encoder", encoder))  # through encoder.json
    with torch.inference_mode():
        torch.testing.assert_close(again(again.preprocess(films)), wanted[:, 0], rtol=0, atol=1e-5)


def test_positions_of_another_film_size_are_those_of_transformers(tmp_path):
    model, folder = hugging_face(tmp_path, "Dinov2", image_size=56, patch_size=14)
    encoder, said = sources.find(folder).open(image_size=28)
    assert "resampled from 4 x 4 to 2 x 2" in said
    x = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        wanted = model(x).last_hidden_state
        torch.testing.assert_close(encoder.features(x), wanted, rtol=0, atol=1e-5)


def test_the_processors_statistics_are_those_of_its_own_pixels(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra `text`")
    for more in ({}, {"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}):
        own = transformers.BitImageProcessor(
            do_resize=False, do_center_crop=False, image_mean=0.5, image_std=0.3, **more
        )
        own.save_pretrained(tmp_path)
        source_mean, source_std = sources.statistics(tmp_path, 3, (0.0,), (1.0,))
        film = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
        wanted = own(np.stack([film] * 3, -1), return_tensors="pt")["pixel_values"]
        ours = enc.create("resnet10t", image_size=32, in_chans=3).preprocess
        ours = type(ours)(32, "dataset", source_mean, source_std, 3)
        torch.testing.assert_close(ours(film), wanted.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda f: (f / "config.json").write_text('{"model_type": "clip"}'),
            "model_type 'clip' is not read; wanted one of",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights beside it; wanted model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "not an encoder folder"),
        (
            lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('": 2,', '": 3,')),
            "3 attention heads|cannot make|do not fit",
        ),
        (
            lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"gelu"', '"mish"')),
            "hidden_act 'mish' is not read",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, change, says):
    _, folder = hugging_face(tmp_path, "ViT")
    change(folder)
    with pytest.raises(UserError, match=says):
        enc.load(folder)


# ---- timm's own folders, and files in its keys.


@pytest.mark.parametrize(
    "arch, size, args",
    [
        ("vit_tiny_patch16_224", 32, SMALL),
        ("eva02_tiny_patch14_224", 28, SMALL),
        ("swin_tiny_patch4_window7_224", 32, HIERARCHY),
        ("convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
        ("lcnet_035", 32, {}),
        ("regnetx_002", 32, {}),
    ],
)
def test_a_folder_of_timm_gives_timms_features_without_its_head(tmp_path, arch, size, args):
    from timm.models._hub import save_for_hf

    more = {} if arch in ("convnext_atto", "lcnet_035", "regnetx_002") else {"img_size": size}
    torch.manual_seed(0)
    theirs = timm.create_model(arch, num_classes=7, **more, **args).eval()
    theirs.pretrained_cfg |= {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4), "input_size": (3, size, size)}
    save_for_hf(theirs, tmp_path, model_args={**more, **args}, safe_serialization=True)
    half = {key: value.half() if value.is_floating_point() else value for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(half)
    save_file({key: value.contiguous() for key, value in half.items()}, tmp_path / "model.safetensors")
    encoder = enc.load(tmp_path)
    assert encoder.preprocess.mean == (0.3, 0.4, 0.5) and encoder.meta["image_size"] == size
    owner = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    x = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), owner(x), rtol=0, atol=1e-5)
    bare = enc.create(arch, in_chans=3, image_size=size, model_args=args).eval()
    load_weights(bare, tmp_path / "model.safetensors", heads=2)
    with torch.inference_mode():
        torch.testing.assert_close(bare(x), owner(x), rtol=0, atol=1e-5)


def test_a_file_of_eva_x_in_its_own_names_is_read_by_timms_conversion(tmp_path):
    args = {**SMALL, "patch_size": 16, "ref_feat_shape": (2, 2), "qkv_fused": False, "scale_mlp": True}
    torch.manual_seed(0)
    theirs = timm.create_model("eva02_base_patch14_224", img_size=32, num_classes=0, **args).eval()
    state = {}
    for key, value in theirs.state_dict().items():
        for name, by in (
            ("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3"), ("mlp.norm", "mlp.ffn_ln"),
            ("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias"), ("fc_norm", "norm"),
        ):  # fmt: skip
            key = key.replace(name, by)
        state[key] = value
    state |= {
        "mask_token": torch.zeros(1, 1, 48),
        "lm_head.weight": torch.zeros(3, 48),
        "rope.freqs_cos": torch.zeros(4, 2),
    }
    torch.save({"model": state}, tmp_path / "eva_x.pt")
    ours = enc.create("eva02_base_patch14_224", in_chans=3, image_size=32, model_args=args).eval()
    load_weights(ours, tmp_path / "eva_x.pt", heads=2)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


# ---- Layouts known by name.


def test_torchxrayvisions_files_hold_a_whole_module_and_are_read_without_running_it(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xrv = pytest.importorskip("torchxrayvision", reason="needs torchxrayvision")
        from torchxrayvision.datasets import normalize
    torch.manual_seed(0)
    theirs = xrv.models.DenseNet(num_classes=18).eval()
    torch.save(theirs, tmp_path / "mimic_ch-densenet121-best.pt")
    source = sources.find(f"torchxrayvision:{tmp_path}/mimic_ch-densenet121-best.pt")
    encoder, _ = source.open(image_size=64)
    film = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    x = encoder.preprocess(film)
    torch.testing.assert_close(x[0, 0], torch.from_numpy(normalize(film.astype(np.float32), 255)), atol=1e-3, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), theirs.features2(x), rtol=0, atol=1e-5)
    assert source.image_size == 224 and "MIMIC" in source.card


def test_rad_dino_by_name_is_its_folder_with_its_own_statistics(tmp_path):
    model, folder = hugging_face(tmp_path, "Dinov2", image_size=28, patch_size=14)
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing"):
        enc.load(f"rad-dino:{folder}")
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.53, 0.53, 0.53], "image_std": [0.26, 0.26, 0.26]}'
    )
    encoder = enc.load(f"rad-dino:{folder}")
    x = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), model(x).pooler_output, rtol=0, atol=1e-5)
    assert encoder.preprocess.std == (0.26, 0.26, 0.26)
    assert "MIMIC-CXR" in sources.find(f"rad-dino:{folder}/model.safetensors").card


@pytest.mark.parametrize("chunked", [False, True])
def test_chexfounds_teacher_is_a_dinov2_with_registers_and_gated_blocks(tmp_path, chunked):
    model, _ = hugging_face(
        tmp_path,
        "Dinov2WithRegisters",
        hidden_size=64,
        num_attention_heads=1,
        use_swiglu_ffn=True,
        num_register_tokens=4,
    )
    from tests.pretrain.test_weights import by_old_names, by_published_names, swiglu_as_one

    state = by_published_names(swiglu_as_one(by_old_names(model.state_dict())), chunked=chunked)
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    teacher |= {"dino_head.mlp.0.weight": torch.zeros(3, 64), "ibot_head.last_layer.weight_g": torch.zeros(3, 1)}
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    source = sources.find(f"chexfound:{tmp_path}")
    encoder, _ = source.open()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.features(x), model(x).last_hidden_state, rtol=0, atol=1e-5)
    assert "MIMIC-CXR" in source.card
    torch.save({"teacher": {"backbone.fc.weight": torch.zeros(2)}}, tmp_path / "teacher_checkpoint.pth")
    with pytest.raises(UserError, match="not CheXFound's layout"):
        enc.load(f"chexfound:{tmp_path}")


# ---- The hub.


def fake_hub(monkeypatch, folder):
    """hf_hub_download that takes files of `folder`, and answers as the hub does where there is none."""
    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def download(repo, file, **_):
        asked.append((repo, file))
        if not (folder / file).is_file():
            raise (
                errors.LocalEntryNotFoundError("offline")
                if folder.name == "offline"
                else errors.EntryNotFoundError("404")
            )
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "_reachable", lambda *_: folder.name != "offline")
    return asked


def test_a_hubs_repository_is_read_as_its_folder(tmp_path, monkeypatch):
    model, folder = hugging_face(tmp_path, "ViT")
    (folder / "README.md").write_text("---\ndatasets:\n- mimic-cxr\n---\nA model.")
    asked = fake_hub(monkeypatch, folder)
    source = sources.find("hf-hub:someone/a-vit@main")
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(source.open()[0].features(x), model(x).last_hidden_state, rtol=0, atol=1e-5)
    assert asked[0] == ("someone/a-vit", "config.json") and "README.md lists mimic-cxr" in source.card


def test_timm_by_name_takes_its_own_statistics(tmp_path, monkeypatch):
    theirs = timm.create_model("test_vit", num_classes=3).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = fake_hub(monkeypatch, tmp_path)
    encoder = enc.load("timm:test_vit.r160_in1k")
    assert asked[0] == ("timm/test_vit.r160_in1k", "model.safetensors")
    assert encoder.meta["image_size"] == 160 and encoder.preprocess.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="timm lists no such model"):
        enc.load("timm:no_such_net")


@pytest.mark.parametrize(
    "spec, says",
    [
        ("hf-hub:someone/a-vit", r"config\.json is not in the local cache.*config\.json, model\.safetensors"),
        (
            "timm:test_vit.r160_in1k",
            r"is not in the local cache.*fetch model\.safetensors.*of timm/test_vit\.r160_in1k",
        ),
        ("rad-dino", r"of microsoft/rad-dino"),
        ("hf-hub:", "no name follows"),
        ("rad-dino:nowhere", "nowhere does not exist"),
    ],
)
def test_offline_names_the_files_to_bring(tmp_path, monkeypatch, spec, says):
    (tmp_path / "offline").mkdir()
    fake_hub(monkeypatch, tmp_path / "offline")
    with pytest.raises(UserError, match=says):
        enc.load(spec)


def test_an_unreachable_hub_is_noticed_without_its_clients_retries(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def download(repo, file, local_files_only=False, **_):
        asked.append(local_files_only)
        raise errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "getproxies", dict)
    with pytest.raises(UserError, match="cannot be reached"):
        enc.load("hf-hub:someone/a-vit")
    assert asked == [True]


# ---- Model cards, and a start of pretraining.


@pytest.mark.parametrize(
    "text, says",
    [
        ("---\ndatasets:\n  - StanfordAIMI/mimic_cxr_jpg\n---\n", "lists mimic_cxr_jpg"),
        ("Trained on MIMIC-CXR and CheXpert.", "lists MIMIC-CXR"),
        ("We mimic the behaviour of radiologists.", ""),
        ("", ""),
    ],
)
def test_a_model_card_that_lists_mimic_is_noticed(tmp_path, text, says):
    (tmp_path / "README.md").write_text(text)
    found = hub.card_note(tmp_path / "model.safetensors")
    assert says in found and bool(says) == bool(found)


def test_a_run_starts_from_a_folder_of_the_same_network_only(tmp_path):
    model, folder = hugging_face(tmp_path, "Dinov2", image_size=28, patch_size=14)
    args = {**SMALL, "init_values": 1.0}
    ours = enc.create("vit_base_patch14_dinov2", image_size=28, in_chans=1, model_args=args).eval()
    said = sources.start_from(ours, str(folder))
    assert "from 3 to 1 channels" in said and "mean 0.485, 0.456, 0.406" in said
    x = torch.randn(2, 1, 28, 28)
    with torch.inference_mode():
        wanted = model(x.expand(-1, 3, -1, -1)).last_hidden_state
        torch.testing.assert_close(ours.features(x), wanted, rtol=0, atol=1e-5)
    other = enc.create("vit_base_patch14_dinov2", image_size=28, model_args={**args, "num_heads": 3})
    with pytest.raises(UserError, match=r"attention heads 2 there, 3 in this config.*set encoder\.arch="):
        sources.start_from(other, str(folder))
