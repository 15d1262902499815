"""Every method: its loss compared with lightly's, its gradients in parts and over two processes, its loop interface."""

import dataclasses
import os
import socket
from pathlib import Path

import lightly.loss as theirs
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
from lightly.models.utils import get_at_index, patchify
from torch import nn

from configs import UserError, load
from pretrain import build
from pretrain import encoder as enc
from pretrain.accumulate import backward
from pretrain.config import PretrainConfig
from pretrain.methods import Batch, Method, Setup, find
from pretrain.methods.record import Record, contrast, prediction_error
from pretrain.options import METHODS, SECTIONS

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
RESNET = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
VIT, CONV = "vit_tiny_patch16_224", "resnet34"
CONVOLUTIONAL = [name for name in METHODS if not find(name).needs_vit]
USES = [{"inject": "add"}, {"inject": "concat"}, {"inject": "predictor"}, {"use": "predict"}, {"use": "contrast"}]


def method(name: str, norm: str = "layer", arch: str = VIT, **record) -> Method:
    given = {"features": "f", "store": "s", "out": "o", "method": name}
    config = load(PretrainConfig, given, ["mae.decoder_width=16", "mae.decoder_heads=2"] if name == "mae" else [])
    section = SECTIONS.get(name)
    options = getattr(config, section) if section else None
    if name in ("msn", "pmsn"):
        options = options.model_copy(update={"prototypes": 8})
    if name in ("dino", "ibot"):
        norm = "none" if norm == "layer" else norm
        options = options.model_copy(update={"bottleneck": 12})
    torch.manual_seed(0)
    encoder = enc.create(arch, image_size=32, model_args=TINY if arch == VIT else RESNET)
    return find(name)(encoder, Setup(16, 8, norm, Record(**record), options))


def batch(name: str, films: int = 4, static: int = 0, seed: int = 1) -> Batch:
    """Views of 32 px with 4 patches; a random view and two focal ones, except for MAE."""
    random = torch.Generator().manual_seed(seed)
    views = [torch.randn(n * films, 1, side, side, generator=random) for n, side in ((1, 32), (1, 32), (2, 16))]
    keep = torch.stack([torch.randperm(4, generator=random)[:3].sort()[0] for _ in range(films)])
    masked = find(name).masked
    anchors = [] if name == "mae" else views[1:]
    kept = [] if name == "mae" else [keep if "random" in masked else None, None]
    record = torch.randn(films, static, generator=random) if static else None
    known = torch.rand(films, static, generator=random) < 0.7 if static else None
    subjects = torch.arange(films) // 2 if static else None
    return Batch(views[0], anchors, kept, record, known, subjects, keep if "target" in masked else None)


def no_masks(views: Batch) -> Batch:
    return Batch(views.target, views.anchors, [None] * len(views.anchors), views.static, views.known, views.subjects)


# ---- Values and gradients.


def expected_loss(name: str, m: Method, views: Batch) -> torch.Tensor:
    """The loss of the method as in lightly's examples, on our networks."""
    student = [m.anchor_head(m.anchor(view)) for view in views.views] if name != "mae" else []
    if name in ("simclr", "vicreg"):
        loss = theirs.NTXentLoss(0.1) if name == "simclr" else theirs.VICRegLoss()
        return torch.stack([loss(student[0], other) for other in student[1:]]).mean()
    if name == "lejepa":
        torch.manual_seed(5)
        return theirs.LeJEPALoss()(global_proj=torch.stack(student[:2]), local_proj=torch.stack(student[2:]))
    if name == "byol":
        wanted = [m.target_head(m.target(view)).detach() for view in views.views[:2]]
        pairs = [(i, j) for i in range(4) for j in range(2) if i != j]
        return torch.stack([theirs.NegativeCosineSimilarity()(m.guess(student[i]), wanted[j]) for i, j in pairs]).mean()
    if name == "dino":
        teacher = [m.target_head(m.target(view)).detach() for view in views.views[:2]]
        return theirs.DINOLoss(8, warmup_teacher_temp_epochs=1)(teacher, student)
    if name == "ibot":
        return _ibot(m, views)
    return _mae(m, views)


def _ibot(m: Method, views: Batch) -> torch.Tensor:
    mask = torch.ones(4, 4, dtype=torch.bool).scatter_(1, views.target_keep, False)
    large = views.views[:2]
    tokens = [m.anchor(view, hide=(mask, m.mask_token), tokens=True) for view in large]
    seen = [m.target(view, tokens=True) for view in large]
    student = [m.anchor_head(t[:, 0]) for t in tokens] + [m.anchor_head(m.anchor(view)) for view in views.views[2:]]
    teacher = [m.target_head(t[:, 0]).detach() for t in seen]
    of_films = theirs.DINOLoss(8, teacher_temp=0.07, warmup_teacher_temp_epochs=1)(teacher, student)
    wanted, got = ([head(t[:, 1:][mask]) for t in ts] for head, ts in ((m.target_head, seen), (m.anchor_head, tokens)))
    masks = torch.cat([mask, mask]).view(8, 2, 2)
    return of_films + theirs.IBOTPatchLoss(8, teacher_temp=0.07)(torch.cat(wanted).detach(), torch.cat(got), masks)


def _mae(m: Method, views: Batch) -> torch.Tensor:
    decoder = MAEDecoderTIMM(
        4, 16, in_chans=1, embed_dim=24, decoder_embed_dim=16, decoder_depth=8, decoder_num_heads=2
    )
    ours = {k.replace("pos_embed", "decoder_pos_embed").replace("blocks.", "decoder_blocks."): v
            for k, v in m.decoder.state_dict().items()}  # fmt: skip
    ours = {k.replace("norm.", "decoder_norm.") if k.startswith("norm.") else k: v for k, v in ours.items()}
    ours |= {f"decoder_embed.{k}": v for k, v in m.anchor_head.state_dict().items()}
    ours |= {f"decoder_pred.{k}": v for k, v in m.paint.state_dict().items()}
    decoder.load_state_dict(ours)
    keep = torch.cat([torch.zeros(4, 1, dtype=torch.long), views.target_keep + 1], dim=1)
    hidden = torch.tensor([[i for i in range(1, 5) if i not in row] for row in keep.tolist()])
    small = decoder.embed(m.anchor(views.target, keep=views.target_keep, tokens=True))
    whole = decoder.mask_token.repeat(4, 5, 1).scatter(1, keep[..., None].expand(-1, -1, 16), small)
    painted = decoder.predict(get_at_index(decoder.decode(whole), hidden))
    wanted = get_at_index(patchify(views.target, 16), hidden - 1)
    wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
    return nn.functional.mse_loss(painted, wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("msn", "pmsn")])
def test_the_loss_and_its_gradients_are_lightlys(name):
    ours, other = method(name), method(name)
    if name == "ibot":
        with torch.no_grad():
            for m in (ours, other):
                m.mask_token += 0.1
    views = batch(name) if find(name).needs_vit else no_masks(batch(name))
    torch.manual_seed(5)
    loss = ours(views)["loss"]
    wanted = expected_loss(name, other, views)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    loss.backward()
    wanted.backward()
    atol = 1e-6 * max(1.0, abs(wanted.item()))
    for (key, a), b in zip(ours.anchor.named_parameters(), other.anchor.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=atol, msg=key)


def test_heads_are_lightlys():
    ours, other = method("simclr", norm="batch").anchor_head, SimCLRProjectionHead(24, 16, 8).layers
    other.load_state_dict(ours.state_dict())
    x = torch.randn(6, 24)
    torch.testing.assert_close(ours(x), other(x))


@pytest.mark.parametrize("record", [{}, *USES], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_trained_parameter_gets_a_gradient_and_no_target_does(name, record):
    """What several processes need; also in the second pass of exact accumulation."""
    if not find(name).is_told and "inject" in record:
        pytest.skip("has no embedding to condition")
    static = 3 if record else 0
    m = method(name, width=static, **record)
    backward(m, m, batch(name, static=static), Accelerator(cpu=True), 2, exact=True)
    for key, parameter in m.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert not (key.startswith("target") and parameter.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(name):
    one, other = (method(name, width=3, use="contrast") for _ in range(2))
    accelerator = Accelerator(cpu=True)
    views = batch(name, static=3)
    torch.manual_seed(3)
    whole = backward(one, one, views, accelerator, 1, exact=True)
    torch.manual_seed(3)
    parts = backward(other, other, views, accelerator, 2, exact=True)
    torch.testing.assert_close(parts["loss"], whole["loss"].detach(), rtol=1e-5, atol=1e-6)
    atol = 1e-6 * max(1.0, abs(whole["loss"].item()))
    for (key, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=atol, msg=key)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_nets_train_with_what_drops_no_tokens(name):
    m, views = method(name, "batch", CONV), batch(name)
    out = m(no_masks(views))
    out["loss"].backward()
    assert torch.isfinite(out["loss"]) and out["features"].shape == (4, 16)


# ---- Two processes.


def _gradients(name: str, use: str, views: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    m = method(name, width=3, use=use)
    torch.manual_seed(9)  # of LeJEPA's directions
    loss = m(views)["loss"]
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in m.named_parameters() if p.grad is not None}


def _one_of(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for name in METHODS:
        for use in ("predict", "contrast"):
            loss, grads = _gradients(name, use, batch(name, static=3).parts(world)[rank])
            for value in (loss, *grads.values()):
                dist.all_reduce(value)
                value /= world
            found[name, use] = loss, grads
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_of, args=(2, port, str(tmp_path)), nprocs=2)
    for (name, use), (loss, grads) in torch.load(tmp_path / "found.pt").items():
        wanted, whole = _gradients(name, use, batch(name, static=3))
        atol = 1e-6 * max(1.0, abs(wanted.item()))
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6, msg=f"{name} {use}")
        for key, value in whole.items():
            torch.testing.assert_close(grads[key], value, rtol=1e-3, atol=atol, msg=f"{name} {use} {key}")


# ---- The record.


def test_what_is_unknown_is_no_target():
    """By hand: a binary column with logit 0 costs log 2, a number that is 2 off costs 4; the unknown entry costs
    nothing."""
    guess, static = torch.tensor([[[0.0, 3.0], [0.0, 9.0]]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    known, binary = torch.tensor([[True, True], [True, False]]), torch.tensor([True, False])
    found = prediction_error(guess, static, known, binary)
    assert found.item() == pytest.approx((2 * 0.693147 + 4) / 3, rel=1e-5)
    assert prediction_error(guess, static, torch.zeros_like(known), binary).item() == 0


def test_the_contrast_knows_subjects_and_empty_records():
    """Films 0 and 1 are of one subject and film 3 has no record: the only negative of film 0 is the record of film
    2."""
    random = torch.Generator().manual_seed(0)
    films, records = torch.randn(1, 4, 5, generator=random), torch.randn(4, 5, generator=random)
    usable, subjects = torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 2])
    found = contrast(films, records[None], usable[None], subjects, temperature=0.5)
    unit = nn.functional.normalize
    cosine = (unit(films[0], dim=1) @ unit(records, dim=1).T / 0.5).double()
    negatives = {0: [2], 1: [2], 2: [0, 1]}
    terms = [
        torch.logsumexp(m[i, [i, *others]], 0) - m[i, i] for m in (cosine, cosine.T) for i, others in negatives.items()
    ]
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert contrast(films, records[None], torch.zeros(1, 4, dtype=torch.bool), subjects, temperature=0.5).item() == 0


@pytest.mark.parametrize("scale", [1.0, 100.0, 65536.0])  # ehr.predict_weight, or fp16's factor
def test_a_batch_without_a_known_value_has_a_gradient_of_zero(scale):
    guess, film, read = (torch.randn(2, 4, 5).requires_grad_() for _ in range(3))
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    predicted = prediction_error(guess, torch.ones(4, 5), nothing, torch.tensor([True] * 2 + [False] * 3))
    contrasted = contrast(film, read, nothing.any(1)[None], torch.arange(4), temperature=0.1)
    (scale * (predicted + contrasted)).backward()
    assert all((x.grad == 0).all() for x in (guess, film, read))


@pytest.mark.parametrize("record", USES, ids=lambda r: "-".join(r.values()))
@pytest.mark.parametrize("name", [n for n in METHODS if n != "mae"])
def test_the_target_view_of_another_film_has_that_films_record(name, record):
    """MSN's anchors alone use the record; elsewhere the target view's record matters, and its own is used."""
    views = batch(name, static=3)
    theirs = dataclasses.replace(views, target_static=views.static + 1, target_known=views.known)
    same = dataclasses.replace(views, target_static=views.static, target_known=views.known)

    def loss(given):
        m = method(name, width=3, **record)
        for parameter in m.record.parameters():  # W = 0 at the start
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        return m(given)["loss"].item()

    sees = name not in ("msn", "pmsn") and not ("inject" in record and name in ("simclr", "vicreg", "lejepa"))
    assert loss(same) == pytest.approx(loss(views), rel=1e-5)
    assert (loss(theirs) != pytest.approx(loss(views), rel=1e-4)) == sees


def test_a_prediction_and_a_contrast_take_the_record_of_each_view():
    random = torch.Generator().manual_seed(0)
    films, records = torch.randn(2, 4, 5, generator=random), torch.randn(2, 4, 5, generator=random)
    usable, subjects = torch.tensor([[True] * 4, [True, True, False, True]]), torch.arange(4)
    found = contrast(films, records, usable, subjects, temperature=0.5).item()
    each = [
        contrast(f[None], r[None], u[None], subjects, temperature=0.5)
        for f, r, u in zip(films, records, usable, strict=True)
    ]
    assert found == pytest.approx((4 * each[0].item() + 3 * each[1].item()) / 7, rel=1e-5)
    known, binary = torch.rand(2, 4, 5, generator=random) < 0.7, torch.tensor([False] * 5)
    error = ((films - records) ** 2)[known].mean().item()
    assert prediction_error(films, records, known, binary).item() == pytest.approx(error, rel=1e-5)


# ---- Two processes.


@pytest.mark.parametrize("name", [name for name in METHODS if name != "msn"])
def test_values_of_the_method_fill_what_is_not_given(name):
    given = {"features": "f", "store": "s", "out": "o", "method": name, "optim": {"epochs": 3}}
    config = load(PretrainConfig, given)
    assert config.optim.epochs == 3 and config != PretrainConfig(**{**given, "method": "msn"})
    build._suits(config, find(name), enc.create(VIT, image_size=32, model_args=TINY))


def test_the_teacher_warms_up_and_its_last_layer_waits():
    m = method("ibot")
    m.setup = Setup(16, 8, "none", options=m.setup.options, steps_per_epoch=10)
    seen = []
    for step in (0, 150, 300, 900):
        m.before_step(step)
        seen.append(round(m.teacher_temperature, 4))
    assert seen == [0.04, 0.055, 0.07, 0.07]
    for step, frozen in ((9, True), (10, False)):
        m(batch("ibot"))["loss"].backward()
        m.before_update(step)
        assert (m.anchor_head.last_layer.weight_v.grad is None) == frozen


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method=sincl"], "did you mean `simclr`"),
        (["method=mae", "encoder.arch=densenet121"], "works on the tokens of a ViT"),
        (["method=ibot", "encoder.arch=resnet34"], "works on the tokens of a ViT"),
        (["method=mae", "views.num_random=1"], "sees one view of a film"),
        (["method=mae", "mask.ratio=0"], "set mask.ratio"),
        (["method=mae", "films.positives=patient"], "compares no two films"),
        (["method=mae", "mae.decoder_heads=7"], "multiple of decoder_heads"),
        (["method=simclr", "optim.batch_size=1"], "wanted at least 2"),
        (["method=simclr", "views.num_random=0"], "there is no anchor to train"),
        (["method=ibot", "mask.focal=true"], "masks no focal views"),
        (["method=dino", "preset=paper"], "leave preset out"),
        (["method=byol", "method_args={a: 1}"], "method_args is for a method of your own"),
        (["method=nowhere.py:Mine"], "no such file"),
    ],
)
def test_what_a_method_cannot_do_is_said(words, says):
    with pytest.raises(UserError, match=says):
        build.method(load(PretrainConfig, {"features": "f", "store": "s", "out": "o"}, words))


def test_a_class_of_ones_own_is_read_from_its_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from pretrain.methods.simclr import SimCLR\nclass Mine(SimCLR):\n    pass\nother = 3\n")
    assert issubclass(find(f"{path}:Mine"), Method) and find(f"{path}:Mine") is find(f"{path}:Mine")
    for word, says in ((":other", "is no pretrain.methods.base.Method"), (":None_", "has no class `None_`")):
        with pytest.raises(UserError, match=says):
            find(f"{path}{word}")
