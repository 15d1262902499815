"""What each process of a pretraining holds of a large ViT's weights, counted on networks without memory.

    ./launch.sh python -m benchmarks.replica

Output: a Markdown table: parameters; GB of five fp32 copies (weights, gradients, AdamW's two moments, the target); the
same with the bf16 copy that autocast keeps with precision=bf16. Activations, head and prototypes are not in it.
"""

from __future__ import annotations

import argparse

import timm
import torch

NAMES = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
}
COPIES, FP32, BF16 = 5, 4, 2


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, in_chans=1, num_classes=0).parameters())


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print("| encoder | parameters, million | five fp32 copies, GB | with the bf16 copy, GB |\n|---|---|---|---|")
    for title, name in NAMES.items():
        number = parameters(name)
        fp32, both = (number * each / 1e9 for each in (COPIES * FP32, COPIES * FP32 + BF16))
        print(f"| {title} | {number / 1e6:.0f} | {fp32:.1f} | {both:.1f} |", flush=True)


if __name__ == "__main__":
    main()
