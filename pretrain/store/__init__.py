"""Pack films once into memory-mapped shards."""

from pretrain.store.read import Store
from pretrain.store.write import pack
