"""encoder/ of a run with its model card, copies of it for other readers, and pushes to a hub."""

from pretrain.export.card import NO_RESULTS, READABLE, model_card
from pretrain.export.make import _ridge, export, readability, write
