"""Self-supervised methods, one class each, behind one interface for the training loop."""

from pretrain.methods.base import Batch, Method, Setup
from pretrain.methods.names import find

__all__ = ["Batch", "Method", "Setup", "find"]
