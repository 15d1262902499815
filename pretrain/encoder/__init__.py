"""Image encoders: timm networks, their preprocessing, and encoder/ on disk."""

from pretrain.encoder.model import Encoder, about, create, differences, embed, load, read_meta, save, write_files
