"""ViT blocks: timm's numbers and gradients, without unused outputs."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain import encoder as enc
from pretrain.encoder import network as blocks

ARCHS = [
    ("vit_tiny_patch16_224", 64, {"depth": 3, "num_heads": 6}),
    ("vit_tiny_patch16_224", 160, {"depth": 2, "num_heads": 3}),
    ("vit_small_patch14_reg4_dinov2", 56, {"depth": 2}),  # layer scale, registers
    ("vit_tiny_patch16_224", 64, {"depth": 2, "qk_norm": True}),
    ("vit_tiny_patch16_224", 64, {"depth": 2, "qkv_bias": False}),
]


def pair(arch, size, args):
    torch.manual_seed(0)
    encoder = enc.create(arch, image_size=size, model_args=args).eval()
    net = timm.create_model(arch, num_classes=0, in_chans=1, **encoder.meta["model_args"]).eval()
    net.load_state_dict(encoder.net.state_dict())
    for parameters in zip(encoder.net.parameters(), net.parameters(), strict=True):
        torch.manual_seed(parameters[0].numel())
        change = 0.1 * torch.randn_like(parameters[0])  # biases and layer scales that show
        for parameter in parameters:
            parameter.data += change
    return encoder, net


@pytest.mark.parametrize("arch, size, args", ARCHS)
@pytest.mark.parametrize("only_class", [True, False])
def test_numbers_and_gradients_are_those_of_timm(arch, size, args, only_class):
    encoder, net = pair(arch, size, args)
    x = torch.randn(3, 1, size, size)
    ours = encoder(x, "cls")[:, None] if only_class else encoder.features(x)
    theirs = net.forward_features(x)[:, : ours.shape[1]]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    wanted = torch.randn_like(ours)
    ours.backward(wanted)
    theirs.backward(wanted)
    most = max(q.grad.abs().max() for q in net.parameters())
    for (name, p), q in zip(encoder.net.named_parameters(), net.parameters(), strict=True):
        scale = q.grad.abs().max().clamp_min(0.03 * most)  # of a key's shift it is 0 but for rounding
        torch.testing.assert_close(p.grad / scale, q.grad / scale, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: n + m)


def test_the_last_block_computes_one_token_where_one_is_read():
    encoder, _ = pair("vit_tiny_patch16_224", 224, {"depth": 2})
    encoder.exact = False  # as the target of a training; a frozen encoder takes the way of timm, to the last bit
    x, spent = torch.randn(1, 1, 224, 224), {}
    for pool in ("cls", "avg"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder(x, pool)
        spent[pool] = counter.get_total_flops()
    assert spent["cls"] < 0.65 * spent["avg"]  # of two blocks; keys and values of the second are still needed


def test_other_blocks_stay_timms_own():
    encoder, net = pair(
        "vit_tiny_patch16_224", 64, {"depth": 2, "block_fn": timm.models.vision_transformer.ResPostBlock}
    )
    assert not any(blocks.plain(block) for block in encoder.net.blocks)
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(encoder(x, "cls"), net.forward_features(x)[:, 0])
    encoder, _ = pair("vit_tiny_patch16_224", 64, {"depth": 1, "attn_drop_rate": 0.1})
    assert not any(blocks.plain(block) for block in encoder.net.blocks)
