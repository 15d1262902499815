"""Initial weights from elsewhere: the features of the original library's model, or an error that names the
difference."""

import argparse
import os
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from lightly.models.modules import MaskedVisionTransformerTIMM, MaskedVisionTransformerTorchvision
from lightly.models.modules.masked_autoencoder import MAEBackbone
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from configs import UserError
from pretrain import encoder as enc
from pretrain.encoder.weights import load_weights

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def tiny(in_chans: int = 1, arch: str = "vit_tiny_patch16_224", size: int = 32, **args):
    return enc.create(arch, image_size=size, in_chans=in_chans, model_args={**TINY, **args}).eval()


def torchvision_vit(heads: int = 2) -> nn.Module:
    vit = torchvision.models.VisionTransformer(32, 16, 2, heads, 24, 96, num_classes=5).eval()
    nn.init.normal_(vit.encoder.pos_embedding, std=0.5)
    nn.init.normal_(vit.class_token, std=0.5)
    return vit


def timm_vit(**args) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **{**TINY, **args}).eval()


def under(name: str, state: dict) -> dict:
    return {f"{name}.{key}": value for key, value in state.items()}


def other(state: dict) -> dict:
    """Weights of a copy that must not be loaded."""
    return {key: torch.randn(value.shape) for key, value in state.items()}


def same(ours, theirs: torch.Tensor, x: torch.Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs, rtol=1e-4, atol=1e-5)


# ---- One file of each owner: (its network, the file's content) -> the features of the owner's own forward.


def of_torchvision():
    vit = torchvision_vit()
    return vit.state_dict(), lambda x: (setattr(vit, "heads", nn.Identity()), vit(x))[1]


def of_lightly_over_torchvision():
    vit = torchvision_vit()
    model = MaskedVisionTransformerTorchvision(vit, weight_initialization="skip", pos_embed_initialization="skip")
    state = under("backbone", model.state_dict()) | {"projection_head.layers.0.weight": torch.zeros(3, 24)}
    twin = under("anchor_backbone", other(model.state_dict()))  # of MSN: the backbone is its moving average
    return {"state_dict": twin | state | {"prototypes": torch.zeros(4, 24)}, "epoch": 3}, model


def of_lightly_over_timm():
    model = MaskedVisionTransformerTIMM(
        timm_vit(), weight_initialization="skip", pos_embed_initialization="skip"
    ).eval()
    decoder = {"decoder.decoder_embed.weight": torch.zeros(3, 24), "decoder.mask_token": torch.zeros(1, 1, 3)}
    return {"state_dict": under("backbone", model.state_dict()) | decoder}, model


def of_dino():
    vit = timm_vit()
    teacher = under("module.backbone", vit.state_dict()) | {"module.head.mlp.0.weight": torch.zeros(3, 24)}
    student = under("module.backbone", other(vit.state_dict()))
    return {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(arch="vit")}, vit


def of_mae_with_its_decoder():
    vit = timm_vit()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    decoder |= under("decoder_blocks.0", nn.Linear(8, 8).state_dict()) | {"decoder_pred.weight": torch.zeros(768, 8)}
    return {"model": vit.state_dict() | decoder, "args": argparse.Namespace(lr=1), "epoch": 799}, vit


def of_lightly_train():
    vit = timm_vit()
    return under("wrapped_model._model", vit.state_dict()) | {"embed_head.weight": torch.zeros(3, 24)}, vit


def of_our_own_checkpoint():
    vit = timm_vit()
    model = under("target.net", vit.state_dict()) | under("anchor.net", other(vit.state_dict()))
    return {"model": model | {"prototypes": torch.zeros(3, 24)}, "step": 3}, vit


VITS = [
    of_torchvision, of_lightly_over_torchvision, of_lightly_over_timm, of_dino, of_mae_with_its_decoder,
    of_lightly_train, of_our_own_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("owner", VITS, ids=lambda f: f.__name__)
def test_a_vit_of_any_owner_gives_its_owners_features(tmp_path, owner):
    torch.manual_seed(0)
    content, model = owner()
    torch.save(content, tmp_path / "weights.ckpt")
    ours, x = tiny(in_chans=3), torch.randn(2, 3, 32, 32)
    load_weights(ours, tmp_path / "weights.ckpt", heads=2)
    with torch.inference_mode():
        same(ours, model(x), x)


def test_a_published_layout_of_cxr_ehr_msn_has_six_heads_whatever_its_width(tmp_path):
    """Its ViT-Tiny has timm's shapes and twice the heads, so that no shape would show the difference."""
    torch.manual_seed(0)
    backbone = MAEBackbone.from_vit(torchvision.models.VisionTransformer(32, 16, 2, 6, 24, 96)).eval()
    head = nn.Sequential(nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24)).state_dict()
    state = under("backbone", backbone.state_dict()) | under("anchor_backbone", other(backbone.state_dict()))
    state |= under("projection_head.layers", head) | under("anchor_projection_head.layers", head)
    state |= {"prototypes": torch.zeros(8, 24), "f_ehr.weight": torch.zeros(128, 2), "f_ehr.bias": torch.zeros(128)}
    state |= {"ehr_cxr_project_g.weight": torch.zeros(24, 152), "ehr_cxr_project_g.bias": torch.zeros(24)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.0", "loops": {}}, tmp_path / "msn.ckpt")
    for heads in (None, 2):
        with pytest.raises(UserError, match=r"its ViT has 6 attention heads.*\{num_heads: 6\}"):
            load_weights(tiny(in_chans=3), tmp_path / "msn.ckpt", heads=heads)
    ours, x = tiny(in_chans=3, num_heads=6), torch.randn(2, 3, 32, 32)
    said = load_weights(ours, tmp_path / "msn.ckpt")
    assert "ehr_cxr_project_g" in said and "anchor_backbone" in said
    with torch.inference_mode():
        same(ours, backbone.encode(x)[:, 0], x)


# ---- Hugging Face's models are a second implementation of DINOv2 and MAE, whose published names have the same tensors.

NAMES = {"q": "query", "k": "key", "v": "value"}
SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def hugging_face(kind: str, **more):
    transformers = pytest.importorskip("transformers", reason="needs the extra `text`")
    torch.manual_seed(0)
    config = getattr(transformers, kind.replace("ForPreTraining", "").replace("Model", "") + "Config")
    model = getattr(transformers, kind)(config(**{**SHAPE, "layer_norm_eps": 1e-6, **more})).eval()
    for value in model.parameters():
        nn.init.normal_(value, std=0.1)
    return model


def by_old_names(state: dict) -> dict:
    """As transformers named them before version 5, and as the files of the hub have them."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^((?:vit\.)?)layers\.", r"\1encoder.layer.", key)
        key = re.sub(r"attention\.([qkv])_proj", lambda m: "attention.attention." + NAMES[m[1]], key)
        key = key.replace("attention.o_proj", "attention.output.dense")
        if "layernorm_before" in "".join(state):  # ViT, MAE
            key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        renamed[key] = value
    return renamed


def by_published_names(state: dict, *, chunked: bool) -> dict:
    """As facebookresearch/dinov2 names them."""
    state = by_old_names(state)
    out = {"mask_token": state["embeddings.mask_token"]}
    for key, value in state.items():
        if ".attention.attention.query." in key:
            parts = [state[key.replace("query", name)] for name in NAMES.values()]
            key, value = key.replace(".attention.attention.query.", ".attn.qkv."), torch.cat(parts)
        key = re.sub(r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj", key)
        key = key.replace("embeddings.position_embeddings", "pos_embed").replace("embeddings.", "")
        key = re.sub(r"^encoder\.layer\.(\d+)", r"blocks.0.\1" if chunked else r"blocks.\1", key)
        key = key.replace("attention.output.dense", "attn.proj").replace("layernorm", "norm")
        key = re.sub(r"layer_scale([12])\.lambda1", r"ls\1.gamma", key)
        key = key.replace("weights_in", "w12").replace("weights_out", "w3")
        if ".attention." not in key:
            out[key] = value
    return out


def swiglu_as_one(state: dict) -> dict:
    out = {}
    for key, value in state.items():
        if "gate_proj" in key:
            key, value = key.replace("gate_proj", "weights_in"), torch.cat([value, state[key.replace("gate", "up")]])
        if "up_proj" not in key:
            out[key.replace("down_proj", "weights_out")] = value
    return out


@pytest.mark.parametrize("form", ["new names", "old names", "published", "published, in chunks"])
@pytest.mark.parametrize(
    "kind, arch", [("Dinov2Model", "dinov2"), ("Dinov2WithRegistersModel", "reg4_dinov2")], ids=["plain", "registers"]
)
def test_dinov2_gives_the_same_tokens_under_all_its_names(tmp_path, kind, arch, form):
    model = hugging_face(kind)
    state = model.state_dict()
    if form != "new names":
        state = by_old_names(state) if form == "old names" else by_published_names(state, chunked="chunks" in form)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    ours, x = tiny(in_chans=3, arch=f"vit_small_patch14_{arch}", size=28), torch.randn(2, 3, 28, 28)
    load_weights(ours, tmp_path / "model.safetensors", heads=2)
    with torch.inference_mode():
        torch.testing.assert_close(ours.features(x), model(x).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["new names", "old names", "published"])
def test_the_gated_blocks_of_the_largest_dinov2_are_joined(tmp_path, form):
    model = hugging_face("Dinov2WithRegistersModel", use_swiglu_ffn=True)
    state = model.state_dict()
    if form != "new names":
        state = by_old_names(swiglu_as_one(state))
        state = state if form == "old names" else by_published_names(state, chunked=False)
    torch.save(state, tmp_path / "model.pth")
    hidden = model.encoder.layer[0].mlp.down_proj.weight.shape[1]
    args = {"mlp_ratio": 2 * hidden / 24}
    ours = tiny(in_chans=3, arch="vit_giant_patch14_reg4_dinov2", size=28, **args)
    load_weights(ours, tmp_path / "model.pth", heads=2)
    x = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(ours.features(x), model(x).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["new names", "old names"])
def test_hugging_faces_mae_leaves_its_decoder_behind(tmp_path, form):
    sizes = {"image_size": 32, "patch_size": 16, "intermediate_size": 96, "mask_ratio": 0.0}
    sizes |= {f"decoder_{name}": 8 for name in ("hidden_size", "intermediate_size")}
    model = hugging_face("ViTMAEForPreTraining", decoder_num_hidden_layers=1, decoder_num_attention_heads=2, **sizes)
    torch.save(
        by_old_names(model.state_dict()) if form == "old names" else model.state_dict(), tmp_path / "pytorch_model.bin"
    )
    ours, x = tiny(in_chans=3), torch.randn(2, 3, 32, 32)
    assert "decoder" in load_weights(ours, tmp_path / "pytorch_model.bin", heads=2)
    with torch.inference_mode():
        states = model.vit(x, noise=torch.arange(4.0).expand(2, -1)).last_hidden_state
        torch.testing.assert_close(ours.features(x), states, rtol=1e-4, atol=1e-4)


# ---- Convolutional networks.


def of_torchvision_cnn(net):
    return net.state_dict()


def of_solo_learn(net):
    """Its own loader keeps what stands below `backbone.`; the momentum backbone is not evaluated."""
    state = {k: v for k, v in net.state_dict().items() if not k.startswith(("fc.", "classifier."))}
    twin = under("momentum_backbone", other({k: v for k, v in state.items() if v.is_floating_point()}))
    more = {"projector.0.weight": torch.zeros(3, 3), "classifier.weight": torch.zeros(2, 2), "queue": torch.zeros(2, 3)}
    return {"state_dict": twin | under("backbone", state) | more, "hyper_parameters": argparse.Namespace(lr=0.1)}


def of_moco(net):
    state = under("module.encoder_q", net.state_dict())
    return {"state_dict": state | under("module.encoder_k", other(net.state_dict())), "arch": "resnet"}


def of_lightly_children(net):
    children = nn.Sequential(*list(net.children())[:-1])
    twin = {k: v for k, v in other(children.state_dict()).items() if not k.endswith("tracked")}
    return {"state_dict": under("backbone", children.state_dict()) | under("backbone_momentum", twin)}


@pytest.mark.parametrize("owner", [of_torchvision_cnn, of_solo_learn, of_moco, of_lightly_children])
@pytest.mark.parametrize("arch", ["densenet121", "resnet18"])
def test_convolutional_nets_of_any_owner_give_the_same_features(tmp_path, arch, owner):
    theirs = getattr(torchvision.models, arch)(num_classes=5).eval()
    torch.save(owner(theirs), tmp_path / "w.ckpt")
    ours = enc.create(arch, in_chans=3, image_size=64).eval()
    load_weights(ours, tmp_path / "w.ckpt")
    setattr(theirs, "classifier" if arch == "densenet121" else "fc", nn.Identity())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        same(ours, theirs(x), x)


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
    load_weights(ours, tmp_path / "densenet121.pth")
    theirs.classifier = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        same(ours, theirs(x), x)


# ---- Channels, film sizes, own runs.


def test_colour_weights_see_a_gray_film_as_its_three_copies(tmp_path):
    colour = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **TINY).eval()
    torch.save({"state_dict": under("module", colour.state_dict())}, tmp_path / "w.pth")
    gray = tiny()
    assert "from 3 to 1 channels" in load_weights(gray, tmp_path / "w.pth", heads=2)
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        features = colour.forward_features(x.expand(-1, 3, -1, -1))
        torch.testing.assert_close(gray.features(x), features, rtol=1e-4, atol=1e-5)


def test_an_earlier_run_is_taken_as_it_is(tmp_path):
    earlier = tiny()
    enc.save(tmp_path / "run/encoder", earlier)
    later = tiny()
    load_weights(later, tmp_path / "run")
    for key, value in earlier.net.state_dict().items():
        assert torch.equal(later.net.state_dict()[key], value), key


@pytest.mark.parametrize("size", [48, 96])
@pytest.mark.parametrize("args", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_positions_are_resampled_as_timm_does_for_films_of_another_size(tmp_path, size, args):
    earlier = tiny(size=64, **args)
    enc.save(tmp_path / "run/encoder", earlier)
    torch.save(earlier.net.state_dict(), tmp_path / "bare.pth")
    side, prefix = size // 16, 0 if earlier.net.no_embed_class else earlier.net.num_prefix_tokens
    wanted = resample_abs_pos_embed(earlier.net.pos_embed.data, [side, side], num_prefix_tokens=prefix)
    for path in (tmp_path / "run", tmp_path / "bare.pth"):
        later = tiny(size=size, **args)
        assert f"positions resampled from 4 x 4 to {side} x {side}" in load_weights(later, path, heads=2)
        torch.testing.assert_close(later.net.pos_embed.data, wanted)


@pytest.mark.parametrize(
    "made, says",
    [
        (lambda: tiny(num_heads=3), "'num_heads': 2"),
        (lambda: enc.create("resnet18", image_size=32), "arch vit_tiny_patch16_224 there"),
    ],
)
def test_an_encoder_of_another_network_is_refused(tmp_path, made, says):
    enc.save(tmp_path / "encoder", tiny())
    with pytest.raises(UserError, match=says):
        load_weights(made(), tmp_path / "encoder")


# ---- Refusals.


def test_a_bare_vit_needs_its_heads_and_the_right_number(tmp_path):
    torch.save(torchvision_vit().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="init_heads"):
        load_weights(tiny(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="this config has 2"):
        load_weights(tiny(), tmp_path / "vit.pth", heads=6)


def test_two_backbones_of_equal_standing_are_not_guessed_between(tmp_path):
    vit = timm_vit().state_dict()
    torch.save(under("left", vit) | under("right", vit), tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"2 backbones in it: left\., right\."):
        load_weights(tiny(in_chans=3), tmp_path / "two.pth", heads=2)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.pop("norm.bias"), r"1 missing, e\.g\. norm\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected, e\.g\. extra"),
        (lambda s: s.update({"norm.bias": torch.zeros(7)}), r"norm\.bias \(7,\) instead of \(24,\)"),
        (lambda s: s.update({"norm.bias": torch.zeros(24, dtype=torch.int64)}), r"norm\.bias torch\.int64 instead of"),
        (lambda s: s["norm.bias"].fill_(torch.nan), r"not finite, e\.g\. norm\.bias"),
        (lambda s: s["blocks.1.mlp.fc1.weight"][3].fill_(-torch.inf), r"not finite, e\.g\. blocks\.1\.mlp"),
        (lambda s: s["pos_embed"].fill_(torch.nan), r"not finite, e\.g\. pos_embed"),
    ],
    ids=["missing", "unexpected", "shape", "integers", "nan", "infinite", "positions"],
)
@pytest.mark.parametrize("door", ["load", "load_weights", "load_weights of a run"])
def test_weights_are_checked_at_every_door(tmp_path, change, says, door):
    encoder = tiny()
    folder = enc.save(tmp_path / "run/encoder", encoder)
    state = {key: value.clone() for key, value in encoder.net.state_dict().items()}
    change(state)
    save_file(state, folder / "encoder.safetensors")
    with pytest.raises(UserError, match=says):
        if door == "load":
            enc.load(tmp_path / "run")
        else:
            load_weights(tiny(), folder / "encoder.safetensors" if door == "load_weights" else tmp_path / "run", 2)


class Malice:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)

    def __init__(self, path: Path) -> None:
        self.path = path


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_files_that_are_no_weights_are_refused(tmp_path, content):
    path = tmp_path / "w.pth"
    if content is None:
        torch.save({"epoch": 3}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth"):
        load_weights(tiny(), path, heads=2)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_runs(tmp_path, legacy):
    content = {"state_dict": tiny().net.state_dict(), "x": Malice(tmp_path / "ran")}
    torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="could run code"):
        load_weights(tiny(), tmp_path / "w.ckpt", heads=2)
    assert not (tmp_path / "ran").exists()
