"""The method: what moves, what does not, and what the record can and cannot reach."""

import numpy as np
import pytest
import torch

from pretrain import encoder as enc
from pretrain.msn import MSN, Batch, Record, effective_rank
from pretrain.views import draw_keep

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def method(arch: str = "vit_tiny_patch16_224", norm: str = "batch", **record) -> MSN:
    torch.manual_seed(0)
    encoder = enc.create(arch, image_size=32, model_args=TINY if arch.startswith("vit") else {})
    return MSN(encoder, num_prototypes=8, hidden=16, out=8, norm=norm, record=Record(**record))


def batch(films: int = 4, static: int = 0, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    views = [torch.randn(n * films, 1, side, side, generator=random) for n, side in ((1, 32), (1, 32), (2, 16))]
    keep = draw_keep(np.arange(films, dtype=np.uint64), 1, 4, 0.3, 0, 0, "mask")
    record = torch.randn(films, static, generator=random) if static else None
    return Batch(views[0], views[1:], [keep, None], record)


@pytest.mark.parametrize("record", [{}, {"width": 3}, {"width": 3, "inject": "concat"}, {"width": 3, "use": "predict"}])
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
    msn.update_target(0.9)
    torch.testing.assert_close(msn.target.net.cls_token, old + 0.1)


def test_adding_the_record_begins_as_vanilla_msn():
    told = batch(static=3)
    vanilla, conditioned = method(), method(width=3)
    conditioned.load_state_dict(vanilla.state_dict(), strict=False)
    torch.testing.assert_close(conditioned(told)["loss"], vanilla(told)["loss"], rtol=0, atol=0)


def test_the_record_reaches_the_anchor_only():
    msn = method(width=3, inject="concat")
    one, other = batch(static=3), batch(static=3)
    other.static.mul_(-2)
    torch.testing.assert_close(msn.embed_targets(one)[0], msn.embed_targets(other)[0])
    assert not torch.allclose(msn.embed_anchors(one)[0], msn.embed_anchors(other)[0])


def test_each_film_gets_its_own_record_in_every_view():
    msn = method(width=3, inject="concat", norm="layer").eval()
    told = batch(static=3)
    before = msn.embed_anchors(told)[0].unflatten(0, (3, 4))
    told.static[2] += 5.0
    changed = (msn.embed_anchors(told)[0].unflatten(0, (3, 4)) - before).abs().amax(dim=2) > 1e-6
    assert changed.tolist() == [[False, False, True, False]] * 3


def test_focal_views_are_matched_to_their_own_film():
    """View-major order: the anchors of a film change when that film's focal view does, and no other."""
    msn = method(norm="layer").eval()
    views = batch()
    before = msn.embed_anchors(views)[0]
    views.anchors[1][4 + 1] += 1.0  # focal view 1 of film 1
    changed = (msn.embed_anchors(views)[0] - before).abs().amax(dim=1) > 1e-6
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
    before = msn.embed_anchors(views)[0][:4]
    changed = Batch(views.target, [views.anchors[0], views.anchors[1] * 3], [None, None], None)
    torch.testing.assert_close(msn.embed_anchors(changed)[0][:4], before)


def test_effective_rank_counts_directions():
    random = torch.Generator().manual_seed(0)
    full = torch.randn(400, 8, generator=random)
    low = torch.randn(400, 2, generator=random) @ torch.randn(2, 8, generator=random)
    assert 7.5 < effective_rank(full) <= 8.0 and effective_rank(low) <= 2.01
    assert effective_rank(torch.ones(10, 8)) < 1.01
    torch.testing.assert_close(effective_rank(full[:6]), effective_rank(full[:6] + 100), rtol=1e-4, atol=1e-4)
