"""The smallest files that the readers take, for tests that write their own."""

from typing import Any


def encoder_json(**more: Any) -> dict[str, Any]:
    """encoder.json."""
    preprocess = {"resize": 32, "normalise": "crop", "mean": None, "std": None}
    about = {"arch": "vit_tiny_patch16_224", "model_args": {}, "in_chans": 1, "width": 192, "image_size": 32}
    return {**about, "pool": "cls", "preprocess": preprocess, **more}


def series_json(values: list[str], marks: list[str], **more: Any) -> dict[str, Any]:
    """series.json of columns with mean 0 and deviation 1."""
    num = len(values)
    about = {
        "step_hours": 1,
        "columns": [*values, *(f"mask->{name}" for name in marks)],
        "num_values": num,
        "units": [""] * (num + len(marks)),
        "observed_of": [i % len(marks) for i in range(num)],
        "imputation": {"rule": "previous value", "normal": [0.0] * num},
        "normaliser": {"mean": [0.0] * num, "std": [1.0] * num},
    }
    return about | more
