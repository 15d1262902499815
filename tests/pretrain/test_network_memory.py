"""A network that cannot fit into the machine's memory is refused before its weights are allocated."""

import resource
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs import UserError, load
from finetune.config import FuseConfig
from finetune.fusion.train import check_size
from pretrain import build
from pretrain.config import PretrainConfig
from pretrain.encoder import memory, network
from tests.pretrain.small import SMALL


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def four_gigabytes(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 4_000_000_000)


@pytest.mark.usefixtures("four_gigabytes")
@pytest.mark.parametrize(
    "args",
    [
        {"depth": 100_000},
        {"embed_dim": 49_152},
        {"embed_dim": 1_536, "depth": 900, "num_heads": 24},
        {"mlp_ratio": 10**6},
        {"embed_dim": 3 * 2**40},
    ],
)
def test_arguments_of_timm_are_refused_by_the_memory_they_need(args):
    before = peak()
    with pytest.raises(UserError, match=r"encoder\.model_args.*(GB|TB|1000 blocks)") as caught:
        network.check_model_args("vit_tiny_patch16_224", 1, 224, args, memory.TRAINED)
    assert len(str(caught.value).splitlines()) == 1 and peak() - before < 500_000_000


@pytest.mark.usefixtures("four_gigabytes")
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("loss.prototypes=1000000 head.out=65536", "head.out=65536"),
        ("head.hidden=65536", "head.hidden=65536"),
    ],
)
def test_heads_are_refused_by_the_memory_they_need(word, says):
    config = load(PretrainConfig, {"features": "x", "store": "y", "out": "z", **SMALL}, word.split())
    before = peak()
    with pytest.raises(UserError, match=f"{says}.*this machine has 4.0 GB"):
        build.method(config)
    assert peak() - before < 500_000_000


def test_a_batch_of_views_is_refused_by_the_memory_it_needs(monkeypatch):
    monkeypatch.setattr(build, "machine_memory", lambda: 4_000_000_000)
    words = ["optim.batch_size=1000000", "encoder.image_size=32"]
    config = load(PretrainConfig, {"features": "x", "store": "y", "out": "z", **SMALL}, words)
    made, store = build.method(config), SimpleNamespace(size=64, folder="y")
    with pytest.raises(UserError, match=r"optim\.batch_size 1000000: .* are 10 GB, this machine has 4\.0 GB"):
        build._fit(config, store, made.anchor, 1)
    build._fit(config, store, made.anchor, 4)


@pytest.mark.usefixtures("four_gigabytes")
@pytest.mark.parametrize("words", [["layers=100", "hidden=4096"], ["joint=16384"]])
def test_a_fusion_model_is_refused_before_any_work(words):
    config = load(FuseConfig, {"features": "x", "store": "y", "out": "z", "encoder": "e"}, words)
    with pytest.raises(UserError, match=r"model=medfuse, hidden=\d+, layers=\d+, joint=\d+: more than .* GB"):
        check_size(config)
    check_size(config.model_copy(update={"layers": 2, "hidden": 256, "joint": 512}))


def test_what_fits_is_built_with_the_same_weights():
    found = []
    for run in range(2):
        torch.manual_seed(3)
        with memory.weights_fit("x", 4) if run else torch.no_grad():
            layer = nn.LSTM(5, 7)
        found.append([*layer.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
