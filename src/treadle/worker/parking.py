"""Where runs without work are put, so that they hold no device memory: host memory beside a GPU, a file beside a CPU.

A shelf takes the vectors of a run and gives back the same bits later. What it holds need not survive the process:
a run is restored from its snapshot after a death. So the file has no name, and is gone with the worker whatever
happens. Nothing here knows tags, plans or when to park.
Invariant: a run that could not be put away whole is still where it was.

Pinned host memory has not been tried on a GPU yet.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.domain.ops import LoraSpec
from treadle.engine.memory import is_out_of_memory
from treadle.engine.state import Adaptable, Magnitudes, TrainingState, placed_state
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)


class Shelf(Protocol):
    """Takes the equally long float32 vectors of one run and gives them back."""

    def put(self, vectors: Sequence[Tensor]) -> object:
        """Copy the vectors; where they lie. Raises OSError or MemoryError when there is no room, and keeps nothing."""
        ...

    def read(self, place: object) -> Sequence[Tensor]:
        """The vectors, in host memory, good until `drop`. Raises OSError when it cannot."""
        ...

    def drop(self, place: object) -> None:
        """Free the place."""
        ...


class PinnedShelf:
    """Page-locked host memory, up to a bound: a GPU copies to and from it at the speed of its link."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def put(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """See Shelf.put."""
        num_bytes = sum(vector.nbytes for vector in vectors)
        if self._num_bytes + num_bytes > self._max_bytes:
            raise MemoryError(f"{self._num_bytes} of {self._max_bytes} bytes are taken")
        try:
            copies = [torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True) for vector in vectors]
        except RuntimeError as error:
            # The driver bounds page-locked memory too, and torch has no class of its own for that.
            if not is_out_of_memory(error):
                raise
            raise MemoryError(str(error)) from error
        for copy, vector in zip(copies, vectors, strict=True):
            copy.copy_(vector)
        self._num_bytes += num_bytes
        return copies

    def read(self, place: object) -> list[Tensor]:
        """See Shelf.read."""
        assert isinstance(place, list)
        return place

    def drop(self, place: object) -> None:
        """See Shelf.drop."""
        assert isinstance(place, list)
        self._num_bytes -= sum(copy.nbytes for copy in place)
        place.clear()


@dataclass(frozen=True, slots=True)
class _Extent:
    """num_vectors equally long vectors, one behind the other."""

    offset: int
    num_bytes: int
    num_vectors: int


class FileShelf:
    """One nameless file that grows; freed extents are used again for runs of the same size.

    One file, because thousands of idle runs would be thousands of open descriptors.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None
        self._free: dict[int, list[int]] = {}
        self._end = 0
        self._num_taken = 0

    def put(self, vectors: Sequence[Tensor]) -> _Extent:
        """See Shelf.put."""
        file = self._open()
        extent = self._extent(vectors[0].nbytes * len(vectors), len(vectors))
        try:
            offset = extent.offset
            for vector in vectors:
                offset = _write_all(file.fileno(), _host_array(vector).data.cast("B"), offset)
        except OSError:
            self._put_back(extent)
            raise
        assert offset == extent.offset + extent.num_bytes
        return extent

    def read(self, place: object) -> list[Tensor]:
        """See Shelf.read."""
        assert isinstance(place, _Extent)
        assert self._file is not None
        array = np.empty(place.num_bytes // np.dtype(np.float32).itemsize, np.float32)
        _read_all(self._file.fileno(), array.data.cast("B"), place.offset)
        return list(torch.from_numpy(array).chunk(place.num_vectors))

    def drop(self, place: object) -> None:
        """See Shelf.drop."""
        assert isinstance(place, _Extent)
        self._put_back(place)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (lives as long as we)
            weakref.finalize(self, self._file.close)
        return self._file

    def _extent(self, num_bytes: int, num_vectors: int) -> _Extent:
        self._num_taken += 1
        offsets = self._free.get(num_bytes)
        if offsets:
            return _Extent(offsets.pop(), num_bytes, num_vectors)
        self._end += num_bytes
        return _Extent(self._end - num_bytes, num_bytes, num_vectors)

    def _put_back(self, extent: _Extent) -> None:
        self._num_taken -= 1
        self._free.setdefault(extent.num_bytes, []).append(extent.offset)
        if self._num_taken == 0:
            assert self._file is not None
            os.ftruncate(self._file.fileno(), 0)
            self._free.clear()
            self._end = 0


@dataclass(frozen=True, slots=True)
class ParkedRun:
    """A run that lies on a shelf, and what of it is not in its vectors."""

    spec: LoraSpec
    step: int
    num_open_passes: int
    magnitudes: Magnitudes | None
    shelf: Shelf
    place: object

    def drop(self) -> None:
        """Forget the run and free its place."""
        self.shelf.drop(self.place)


def park(state: TrainingState, shelves: Sequence[Shelf]) -> ParkedRun | None:
    """Put a run away on the first shelf with room for it, and release its state; None, and nothing done: no room."""
    vectors = [state.weights.flat, state.exp_avg, state.exp_avg_sq]
    if state.grads is not None:
        vectors.append(state.grads.flat)
    for shelf in shelves:
        try:
            place = shelf.put(vectors)
        except (OSError, MemoryError) as error:
            log.warning("run not parked", shelf=type(shelf).__name__, reason=str(error))
            continue
        parked = ParkedRun(state.spec, state.step, state.num_open_passes, state.magnitudes, shelf, place)
        state.release()
        return parked
    return None


def unpark(parked: ParkedRun, base: Adaptable) -> TrainingState:
    """The run again on the base model's device, bit for bit; its place is free afterwards.

    Raises OSError when its shelf cannot be read, or what the device raises without memory; then it is still parked.
    """
    weights, exp_avg, exp_avg_sq, *grads = parked.shelf.read(parked.place)
    state = placed_state(
        base,
        parked.spec,
        weights,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        grads=grads[0] if grads else None,
        step=parked.step,
        num_open_passes=parked.num_open_passes,
    )
    state.magnitudes = parked.magnitudes
    parked.drop()
    return state


def _host_array(vector: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = vector.detach().cpu().numpy()
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    return array


def _write_all(descriptor: int, data: memoryview, offset: int) -> int:
    """Write at `offset`; where it ends. The kernel may take less than it is given, a full disk nothing."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
    return offset


def _read_all(descriptor: int, data: memoryview, offset: int) -> int:
    while data:
        num_read = os.preadv(descriptor, [data], offset)
        if num_read == 0:
            raise OSError("the file of parked runs ends early")
        data, offset = data[num_read:], offset + num_read
    return offset
