"""Image encoders: timm networks, their preprocessing, encoder/ on disk, and published weights."""

from pretrain.encoder.embed import embed
from pretrain.encoder.model import Encoder, about, create, differences, read_meta, save, write_files
from pretrain.encoder.sources import load
