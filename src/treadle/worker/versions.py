"""Adapter versions that samples read: immutable copies, by the key of the blob that holds them.

A publish puts its copy here, so the first sample after it reads memory; anything else is read once, from where its
trainer left it on this machine or from its blob, and kept while there is room. Dropping a version loses nothing.
"""

from __future__ import annotations

from collections import OrderedDict

from treadle.domain.ids import BlobKey
from treadle.engine.adapter import AdapterWeights
from treadle.engine.base_model import BaseModel
from treadle.engine.files import decode_weights
from treadle.worker.handoff import Handoff

# Versions kept in memory, least recently used dropped first. A rank-32 adapter of the bundled model is about 1 MB,
# of an 8B model 350 MB in float32; the byte bound below is what holds there.
MAX_VERSIONS = 256
MAX_VERSION_BYTES = 2 * 2**30


class Versions:
    """A bounded cache from blob key to adapter weights. Not thread-safe."""

    def __init__(self, base: BaseModel, handoff: Handoff) -> None:
        self._base = base
        self._handoff = handoff
        self._by_key: OrderedDict[BlobKey, AdapterWeights] = OrderedDict()
        self._num_bytes = 0

    def publish(self, key: BlobKey, weights: AdapterWeights) -> None:
        """Keep a copy of `weights` under `key`; later training does not change it."""
        self._keep(key, weights.copy())

    def get(self, key: BlobKey) -> AdapterWeights:
        """The version under `key`, read when needed.

        Raises as Handoff.read when it cannot be had, InvalidRequest when it does not fit the base model.
        """
        weights = self._by_key.get(key)
        if weights is None:
            weights = decode_weights(self._handoff.read(key), self._base)
            self._keep(key, weights)
        self._by_key.move_to_end(key)
        return weights

    def forget_all(self) -> None:
        """Drop what is kept, because memory ran out; samples on their way keep theirs."""
        self._by_key.clear()
        self._num_bytes = 0

    def _keep(self, key: BlobKey, weights: AdapterWeights) -> None:
        assert key not in self._by_key, "blob keys are never reused"
        self._by_key[key] = weights
        self._num_bytes += _num_bytes(weights)
        while len(self._by_key) > 1 and (len(self._by_key) > MAX_VERSIONS or self._num_bytes > MAX_VERSION_BYTES):
            _, dropped = self._by_key.popitem(last=False)
            self._num_bytes -= _num_bytes(dropped)


def _num_bytes(weights: AdapterWeights) -> int:
    return weights.flat.numel() * weights.flat.element_size()
