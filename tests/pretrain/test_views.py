"""Views: independent of batch, workers and processes; both implementations agree with Pillow."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain import views as vw
from pretrain.data import Cutter
from pretrain.draws import film_keys, uniforms
from pretrain.encoder.preprocess import Preprocess
from pretrain.options import ViewsConfig

KEYS = film_keys([f"film-{i}" for i in range(6)])


def films(side: int = 80, number: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (number, side, side), dtype=np.uint8))


def views(count: int, size: int, scale: tuple[float, float], **like: object) -> vw.Views:
    """Views without changes of intensity, unless asked for."""
    return vw.Views(count, size, scale, ViewsConfig.model_validate({"brightness": 0, "contrast": 0, **like}))


@given(low=st.floats(0.05, 1), high=st.floats(0.05, 1), side=st.integers(16, 300), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_boxes_lie_in_the_film(low, high, side, seed):
    plan = vw.draw(views(3, 8, (min(low, high), max(low, high))), KEYS, side, seed, 0, "x")
    top, left, height, width = plan.boxes.unbind(-1)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= side).all() and (left + width <= side).all()


def test_area_is_drawn_in_the_range():
    plan = vw.draw(views(200, 8, (0.3, 0.5), ratio=(1, 1)), KEYS, 400, 0, 0, "x")
    share = plan.boxes[..., 2] * plan.boxes[..., 3] / 400**2
    assert 0.29 < share.min() < 0.32 and 0.48 < share.max() < 0.51


def test_a_films_views_do_not_depend_on_its_batch():
    kind = views(2, 16, (0.3, 1.0), flip=0.5, brightness=0.2, contrast=0.2)
    whole = vw.draw(kind, KEYS, 80, 7, 3, "random")
    alone = vw.draw(kind, KEYS[4:5], 80, 7, 3, "random")
    torch.testing.assert_close(whole.boxes[:, 4:5], alone.boxes)
    torch.testing.assert_close(vw.cut(films(), whole)[[4, 10]], vw.cut(films()[4:5], alone))


@pytest.mark.parametrize("change", [{"seed": 8}, {"epoch": 4}, {"purpose": "focal"}])
def test_seed_epoch_and_purpose_change_views(change):
    given_ = {"seed": 7, "epoch": 3, "purpose": "random"}
    kind = views(2, 16, (0.3, 1.0))
    assert not torch.equal(vw.draw(kind, KEYS, 80, **given_).boxes, vw.draw(kind, KEYS, 80, **given_ | change).boxes)


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(film_keys([str(i) for i in range(4000)]), 8, 0, 0, "x")
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.06


def test_boxes_are_resized_as_pillow_does():
    plan = vw.draw(views(2, 24, (0.1, 1.0)), KEYS, 80, 0, 0, "x")
    ours = vw.cut(films(), plan)
    for v in range(2):
        for b in range(6):
            top, left, height, width = plan.boxes[v, b].int().tolist()
            box = Image.fromarray(films()[b].numpy()).crop((left, top, left + width, top + height))
            theirs = np.asarray(box.resize((24, 24), Image.Resampling.BILINEAR), np.float32) / 255
            assert np.abs(ours[v * 6 + b, 0].numpy() - theirs).max() < 1.01 / 255


def test_matrix_products_cut_what_boxes_cut():
    """The GPU implementation, compared with the CPU one."""
    kind = views(3, 24, (0.1, 1.0), flip=0.5)
    plan = vw.draw(kind, KEYS, 80, 0, 0, "x")
    assert plan.flips
    torch.testing.assert_close(
        vw._cut_by_products(films(), plan), vw._cut_one_by_one(vw.turn(films()), plan), rtol=0, atol=1.01 / 255
    )


@pytest.mark.parametrize("side, size", [(80, 24), (81, 17), (16, 30), (96, 96), (515, 98)])
def test_rows_in_place_of_channels_change_no_pixel(side, size):
    """Compared with torch's kernel on each box alone, also if four divides neither the film nor the view."""
    plan = vw.draw(views(4, size, (0.01, 1.0), flip=0.5), KEYS, side, 0, 0, "x")
    ours = vw._cut_one_by_one(vw.turn(films(side)), plan).unflatten(0, (4, 6))
    for v in range(4):
        for b, film in enumerate(films(side)):
            top, left, height, width = plan.boxes[v, b].int().tolist()
            box = film[None, None, top : top + height, left : left + width]
            whole = torch.nn.functional.interpolate(box, size=(size, size), mode="bilinear", antialias=True)[0, 0]
            torch.testing.assert_close(ours[v, b], (whole.flip(1) if plan.flip[v, b] else whole) / 255, rtol=0, atol=0)


def test_intensities_change_as_written():
    kind = views(2, 16, (0.3, 1.0), brightness=0.2, contrast=0.2, gamma=0.3)
    plan = vw.draw(kind, KEYS, 80, 0, 0, "x")
    plain = vw.cut(films(), vw.draw(views(2, 16, (0.3, 1.0)), KEYS, 80, 0, 0, "x"))
    brightness, contrast, gamma = plan.changes.flatten(0, 1).T[:, :, None, None, None]
    mean = plain.mean(dim=(2, 3), keepdim=True)
    wanted = ((plain - mean) * contrast + mean + brightness).clamp(0, 1) ** gamma
    torch.testing.assert_close(vw.cut(films(), plan), wanted)
    assert not vw.draw(views(2, 16, (0.3, 1.0), contrast=0.2), KEYS, 80, 0, 0, "x").bends


def test_flips_are_off_by_default():
    assert not vw.draw(views(50, 8, (0.3, 1.0)), KEYS, 80, 0, 0, "x").flips


def test_every_patch_can_be_dropped_and_none_always_is():
    keep = torch.cat([vw.draw_keep(KEYS, 2, 16, 0.15, 0, epoch, "mask") for epoch in range(60)])
    assert keep.shape == (60 * 12, 14)
    dropped = 1 - torch.zeros(len(keep), 16).scatter_(1, keep, 1).mean(dim=0)
    assert (dropped > 0.07).all() and (dropped < 0.19).all()  # 2 of 16 each time


def test_at_least_one_patch_stays():
    assert vw.draw_keep(KEYS, 1, 4, 0.99, 0, 0, "mask").shape == (6, 1)


def test_masked_cells_are_filled_and_others_untouched():
    views = torch.arange(2 * 6 * 64 * 64, dtype=torch.float32).view(12, 1, 64, 64) / 1e3 + 5
    keep = vw.draw_keep(KEYS, 2, 4, 0.5, 0, 0, "mask")
    kept = torch.zeros(12, 4, dtype=torch.bool).scatter_(1, keep, True).view(12, 1, 2, 2)
    kept = kept.repeat_interleave(32, 2).repeat_interleave(32, 3)
    noise = vw.draw_noise(KEYS, 2, 64, 0, 0, "noise")
    for filler in (noise, views.roll(1, 0), torch.zeros(1)):
        masked = vw.mask_cells(views, keep, 32, filler)
        torch.testing.assert_close(masked[kept], views[kept], rtol=0, atol=0)
        torch.testing.assert_close(masked[~kept], filler.expand_as(views)[~kept], rtol=0, atol=0)


def test_noise_is_normal_and_each_films_own():
    noise = vw.draw_noise(KEYS, 2, 64, 0, 0, "noise")
    assert noise.shape == (12, 1, 64, 64) and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    torch.testing.assert_close(noise[[4, 10]], vw.draw_noise(KEYS[4:5], 2, 64, 0, 0, "noise"), rtol=0, atol=0)
    assert not torch.allclose(noise[0], noise[1]) and not torch.allclose(noise[0], noise[6])


@pytest.mark.parametrize("fill", ["noise", "mean", "film"])
def test_every_fill_of_a_convolutional_net(fill):
    crop = views(1, 64, (1.0, 1.0), ratio=(1.0, 1.0))
    preprocess = Preprocess(64, "dataset", 0.0, 1.0)
    cutter = Cutter(crop, crop, views(0, 32, (1, 1)), preprocess, 32, False, 0.5, ("random",), fill, 0)
    flat = torch.arange(10, 70, 10, dtype=torch.uint8)[:, None, None].expand(6, 64, 64).contiguous()
    batch = cutter.cut({"films": flat, "plans": cutter.plan(KEYS, 64, 0), "keys": KEYS, "epoch": 0})
    cells = batch.anchors[0].unflatten(2, (2, 32)).unflatten(4, (2, 32)).mean(dim=(1, 3, 5)).flatten(1)  # (B, 4)
    own = flat[:, 0, 0].float()[:, None] / 255
    untouched = (cells - own).abs() < 1e-6
    assert untouched.sum(dim=1).tolist() == [2] * 6 and batch.keep == [None]
    filled, other = cells[~untouched].view(6, 2), own.roll(1, 0).expand(6, 2)
    if fill == "noise":
        assert filled.abs().max() < 0.2 and filled.unique().numel() == 12
    else:
        torch.testing.assert_close(filled, other if fill == "film" else torch.zeros(6, 2))


def test_black_films_stay_finite():
    plan = vw.draw(views(2, 16, (0.3, 1.0), brightness=0.2, contrast=0.2, gamma=0.2), KEYS, 80, 0, 0, "x")
    assert torch.isfinite(vw.cut(torch.zeros(6, 80, 80, dtype=torch.uint8), plan)).all()


def test_a_plan_moves_whole():
    plan = vw.draw(views(2, 16, (0.3, 1.0), flip=0.5, contrast=0.1), KEYS, 80, 0, 0, "x")
    torch.testing.assert_close(vw.cut(films(), plan.to("cpu")), vw.cut(films(), plan))


def test_a_block_is_one_piece_of_the_asked_size_and_lies_elsewhere_in_each_view():
    keep = vw.draw_keep(KEYS, 2, 64, 0.3, 0, 0, "mask", block=True)
    hidden = torch.ones(len(keep), 64, dtype=torch.bool).scatter_(1, keep, False).view(-1, 8, 8)
    assert (hidden.sum(dim=(1, 2)) == int(64 * 0.3)).all() and len(hidden.flatten(1).unique(dim=0)) > 8
    for mask in hidden:  # neighbours of neighbours reach all of it from its first patch
        reached = torch.zeros(8, 8, dtype=torch.bool)
        reached.view(-1)[mask.flatten().nonzero()[0]] = True
        for _ in range(64):
            near = torch.nn.functional.max_pool2d(reached[None].float(), 3, 1, 1)[0] > 0
            reached = near & mask
        assert torch.equal(reached, mask)
