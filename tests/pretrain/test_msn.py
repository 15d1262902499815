"""MSN: which parts are trained, which are not, and what the record can affect."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lightly.models.modules.heads import MSNProjectionHead

from pretrain import encoder as enc
from pretrain.accumulate import backward
from pretrain.methods import Batch, Setup
from pretrain.methods.msn import MSN
from pretrain.methods.record import Record
from pretrain.monitor import effective_rank
from pretrain.options import LossConfig
from pretrain.views import draw_keep

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


USES = [{"inject": "add"}, {"inject": "concat"}, {"inject": "predictor"}, {"use": "predict"}, {"use": "contrast"}]
USES = [{}, *({"width": 3, **use} for use in USES)]
STOCHASTIC = [
    ("vit_tiny_patch16_224", {"drop_path_rate": 0.3}),
    ("vit_tiny_patch16_224", {"pos_drop_rate": 0.3, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_rate": 0.3}),
    ("densenet121", {"drop_rate": 0.3, "proj_drop_rate": 0.3}),
    ("resnet34", {"drop_path_rate": 0.3, "zero_init_last": False, "channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}),
]


def method(arch: str = "vit_tiny_patch16_224", norm: str = "batch", args: dict | None = None, **record) -> MSN:
    torch.manual_seed(0)
    encoder = enc.create(arch, image_size=32, model_args=(TINY if arch.startswith("vit") else {}) | (args or {}))
    return MSN(encoder, Setup(16, 8, norm, Record(**record), LossConfig(prototypes=8)))


def anchors(msn: MSN, views: Batch) -> torch.Tensor:
    """(V*B, out)."""
    return msn.embed_all(views)["anchors"].flatten(0, 1)


def targets(msn: MSN, views: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, out) and the features under them."""
    seen = msn.observe_all(views)
    return seen["targets"][0], seen["features"][0]


def batch(films: int = 4, static: int = 0, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    views = [torch.randn(n * films, 1, side, side, generator=random) for n, side in ((1, 32), (1, 32), (2, 16))]
    keep = draw_keep(np.arange(films, dtype=np.uint64), 1, 4, 0.3, 0, 0, "mask")
    record = torch.randn(films, static, generator=random) if static else None
    return Batch(views[0], views[1:], [keep, None], record)


@pytest.mark.parametrize("record", USES)
def test_every_trained_parameter_gets_a_gradient_and_no_target_does(record):
    msn = method(**record)
    msn(batch(static=record.get("width", 0)))["loss"].backward()
    for name, parameter in msn.named_parameters():
        if name.startswith("target"):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
    assert msn.prototypes.grad.abs().sum() > 0


def test_prototypes_move_after_one_step():
    msn = method()
    before = msn.prototypes.detach().clone()
    optimizer = torch.optim.AdamW(msn.groups(), lr=1e-3)
    msn(batch())["loss"].backward()
    optimizer.step()
    assert not torch.equal(msn.prototypes, before)


def test_target_is_the_moving_average_of_the_anchor():
    msn = method()
    with torch.no_grad():
        for parameter in msn.anchor.parameters():
            parameter += 1.0
    old = msn.target.net.cls_token.clone()
    msn.after_step(0.9)
    torch.testing.assert_close(msn.target.net.cls_token, old + 0.1)


@pytest.mark.parametrize(("arch", "args"), STOCHASTIC, ids=["drop_path", "dropout", "densenet", "resnet"])
def test_the_target_draws_nothing_and_the_anchor_does(arch, args):
    """Two passes are bitwise equal, do not use the generator, and equal those of a network without dropout."""
    msn, plain = method(arch, args=args), method(arch, args={k: v for k, v in args.items() if "drop" not in k})
    plain.load_state_dict(msn.state_dict())
    views = batch(films=8)
    views = views if msn.anchor.is_vit else Batch(views.target, views.anchors[:1], [None], None)
    state = torch.get_rng_state()
    first, second = targets(msn, views), targets(msn, views)
    assert torch.equal(torch.get_rng_state(), state)
    for once, twice, without in zip(first, second, targets(plain, views), strict=True):
        assert torch.equal(once, twice)
        torch.testing.assert_close(once, without)
    assert not torch.allclose(anchors(msn, views), anchors(msn, views))


def test_batch_norm_of_the_target_uses_the_batch_and_keeps_statistics_of_its_own():
    msn = method("densenet121")
    norm = msn.target.net.features.norm0
    views = batch()
    targets(msn, views)
    assert norm.running_mean.abs().sum() > 0 and msn.anchor.net.features.norm0.running_mean.abs().sum() == 0
    brighter = targets(msn, Batch(views.target * 5, [], [], None))[1]  # normalised away
    torch.testing.assert_close(brighter, targets(msn, views)[1], rtol=1e-2, atol=1e-2)
    assert not any(module.training for module in msn.eval().modules())


@pytest.mark.parametrize(("arch", "args"), STOCHASTIC[:2], ids=["drop_path", "dropout"])
def test_exact_accumulation_draws_alike_in_both_passes(arch, args):
    """The gradients equal those of one graph over all parts; both passes of a part draw the same random numbers."""
    views, accelerator = batch(films=4, static=3), Accelerator(cpu=True)
    two_pass, one_graph = (method(arch, norm="layer", args=args, width=3) for _ in range(2))
    torch.manual_seed(7)
    out = backward(two_pass, two_pass, views, accelerator, 2, exact=True)
    torch.manual_seed(7)
    parts = [one_graph.embed_all(part)["anchors"] for part in views.parts(2)]
    wanted = one_graph.finish({"anchors": torch.cat(parts, dim=1)}, one_graph.observe_all(views), views)["loss"]
    wanted.backward()
    torch.testing.assert_close(out["loss"], wanted)
    for (name, ours), theirs in zip(two_pass.named_parameters(), one_graph.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_head_is_lightlys_in_values_and_gradients():
    """Our head has biases before batch norm, as the original; they change neither outputs nor the other gradients."""
    ours, theirs = method().head(24, Setup(16, 8)), MSNProjectionHead(24, 16, 8)
    theirs.layers.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in ("0.bias", "3.bias")})
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    outputs = [head(x) for head in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    wanted = dict(theirs.layers.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad if name in wanted else torch.zeros(16))


def test_adding_the_record_begins_as_vanilla_msn():
    told = batch(static=3)
    vanilla, conditioned = method(), method(width=3)
    conditioned.load_state_dict(vanilla.state_dict(), strict=False)
    torch.testing.assert_close(conditioned(told)["loss"], vanilla(told)["loss"], rtol=0, atol=0)


def test_the_record_reaches_the_anchor_only():
    msn = method(width=3, inject="concat")
    one, other = batch(static=3), batch(static=3)
    other.static.mul_(-2)
    torch.testing.assert_close(targets(msn, one)[0], targets(msn, other)[0])
    assert not torch.allclose(anchors(msn, one), anchors(msn, other))


def test_each_film_gets_its_own_record_in_every_view():
    msn = method(width=3, inject="concat", norm="layer").eval()
    told = batch(static=3)
    before = anchors(msn, told).unflatten(0, (3, 4))
    told.static[2] += 5.0
    changed = (anchors(msn, told).unflatten(0, (3, 4)) - before).abs().amax(dim=2) > 1e-6
    assert changed.tolist() == [[False, False, True, False]] * 3


def test_focal_views_are_matched_to_their_own_film():
    """View-major order: the anchors of a film change when that film's focal view does, and no other."""
    msn = method(norm="layer").eval()
    views = batch()
    before = anchors(msn, views)
    views.anchors[1][4 + 1] += 1.0  # focal view 1 of film 1
    changed = (anchors(msn, views) - before).abs().amax(dim=1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [4 + 4 + 1]


def test_biases_norms_tokens_and_prototypes_are_not_decayed():
    msn = method(width=3)
    decayed, kept, prototypes = msn.groups()
    assert decayed["decays"] and not kept["decays"] and not prototypes["decays"]
    assert all(p.ndim > 1 for p in decayed["params"]) and prototypes["params"][0] is msn.prototypes
    assert any(p is msn.anchor.net.pos_embed for p in kept["params"])
    total = sum(p.numel() for group in msn.groups() for p in group["params"])
    assert total == sum(p.numel() for p in msn.parameters() if p.requires_grad)
    assert len(msn.groups(decay_all=True)[1]["params"]) == 0


def test_parts_keep_films_and_views_together():
    whole = batch(films=4, static=3)
    first, second = whole.parts(2)
    torch.testing.assert_close(second.target, whole.target[2:])
    torch.testing.assert_close(second.anchors[1], whole.anchors[1][[2, 3, 6, 7]])
    torch.testing.assert_close(second.keep[0], whole.keep[0][2:])
    torch.testing.assert_close(first.static, whole.static[:2])


def test_masked_and_unmasked_views_of_a_convolutional_net_pass_batch_norm_apart():
    """Changing focal views must not change the random views' embeddings, which one batch norm over both would."""
    msn = method("resnet34")
    views = batch()
    views = Batch(views.target, views.anchors, [None, None], None)
    before = anchors(msn, views)[:4]
    changed = Batch(views.target, [views.anchors[0], views.anchors[1] * 3], [None, None], None)
    torch.testing.assert_close(anchors(msn, changed)[:4], before)


def test_effective_rank_counts_directions():
    random = torch.Generator().manual_seed(0)
    full = torch.randn(400, 8, generator=random)
    low = torch.randn(400, 2, generator=random) @ torch.randn(2, 8, generator=random)
    assert 7.5 < effective_rank(full) <= 8.0 and effective_rank(low) <= 2.01
    assert effective_rank(torch.ones(10, 8)) < 1.01
    torch.testing.assert_close(effective_rank(full[:6]), effective_rank(full[:6] + 100), rtol=1e-4, atol=1e-4)
