"""Self-supervised methods, one class each; the loop does not know which one runs."""

from pretrain.methods.base import Batch, Method, Setup
from pretrain.methods.names import find

__all__ = ["Batch", "Method", "Setup", "find"]
