"""The PEFT directory inside a checkpoint's file, found by ranges: what a server needs that has no torch.

The file's format is that of engine/files.py, which writes it and checks it whole: safetensors, the adapter under PEFT's
names beside other tensors, and a header with adapter_config.json's content. Invariant: the tensors of the directory are
the file's bytes where they lie; nothing is decoded, and nothing but the header is held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.domain.archive import ReadRange
from treadle.errors import InvalidRequest

METADATA_KEY = "treadle"
TENSOR_PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_LENGTH_BYTES = 8
# The header of an adapter with 100,000 tensors has some 20 MB.
_MAX_HEADER_BYTES = 100 * 2**20
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes [start, stop) of a blob."""

    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class LazyFile:
    """A file that is made of bytes and of parts of one blob, in this order."""

    name: str
    pieces: tuple[bytes | Span, ...]

    @property
    def num_bytes(self) -> int:
        return sum(len(piece) if isinstance(piece, bytes) else piece.num_bytes for piece in self.pieces)


def peft_directory(read: ReadRange) -> tuple[LazyFile, LazyFile]:
    """adapter_config.json and adapter_model.safetensors of the checkpoint that `read` reads; moments stay behind.

    Raises InvalidRequest when it is no checkpoint of the engine's.
    """
    start = _LENGTH_BYTES
    try:
        length = int.from_bytes(read(0, start), "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise ValueError("no safetensors file")
        header: dict[str, Any] = json.loads(read(start, start + length))
        config = json.loads(header.pop("__metadata__")[METADATA_KEY])["adapter_config"]
        new_header, spans = _only_adapter(header, data_start=start + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest("this checkpoint holds no adapter that could be exported") from error
    return LazyFile(CONFIG_NAME, (config_file(config),)), LazyFile(WEIGHTS_NAME, (new_header, *spans))


def config_file(config: Mapping[str, Any]) -> bytes:
    """adapter_config.json: the same settings give the same bytes."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _only_adapter(header: Mapping[str, Mapping[str, Any]], *, data_start: int) -> tuple[bytes, Sequence[Span]]:
    """A safetensors header of the adapter's tensors alone, and where their bytes lie."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    spans: list[Span] = []
    for name, entry, (start, stop) in _tensors(header):
        entries[name] = {**entry, "data_offsets": [offset, offset + stop - start]}
        offset += stop - start
        if spans and spans[-1].stop == data_start + start:
            spans[-1] = Span(spans[-1].start, data_start + stop)
        else:
            spans.append(Span(data_start + start, data_start + stop))
    if not spans:
        raise ValueError("no tensors of an adapter")
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, spans


def _tensors(header: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any], tuple[int, int]]]:
    """The adapter's, in the order in which they lie."""
    found = [(name, entry) for name, entry in header.items() if name.startswith(TENSOR_PREFIX)]
    for name, entry in sorted(found, key=lambda one: one[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if not 0 <= start < stop:
            raise ValueError(f"tensor {name} is empty or lies nowhere")
        yield name, entry, (start, stop)
