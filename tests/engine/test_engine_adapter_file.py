"""The PEFT directory as a server without torch finds it, against the engine's own export."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
from engine_builders import make_state

from treadle.domain.adapter_file import LazyFile, Span, peft_directory
from treadle.domain.ops import LoraSpec
from treadle.engine.base_model import BaseModel
from treadle.engine.files import encode_state, export_peft, export_state
from treadle.errors import InvalidRequest


def reader_of(data: bytes) -> Callable[[int, int], bytes]:
    return lambda start, stop: data[start:stop]


def content(file: LazyFile, data: bytes) -> bytes:
    parts = (data[piece.start : piece.stop] if isinstance(piece, Span) else piece for piece in file.pieces)
    return b"".join(parts)


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_directory_found_by_ranges_is_the_export(base: BaseModel, with_optimizer: bool) -> None:
    state = make_state(base, LoraSpec(rank=4, seed=0))
    data = encode_state(state, base, with_optimizer=with_optimizer, applied_seq=0)
    config, weights = peft_directory(reader_of(data))
    exported = export_peft(data)
    assert content(config, data) == exported[config.name]
    found = safetensors.numpy.load(content(weights, data))
    expected = safetensors.numpy.load(exported[weights.name])
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert weights.num_bytes == len(content(weights, data))


def test_export_of_a_run_is_that_of_its_checkpoint(base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=4, seed=0))
    assert export_state(state, base) == export_peft(encode_state(state, base, with_optimizer=True, applied_seq=3))


def _with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


OURS = {"treadle": json.dumps({"adapter_config": {}})}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        _with_header([]),
        _with_header({"__metadata__": {}}),
        _with_header({"__metadata__": {"treadle": "[]"}}),
        _with_header({"__metadata__": OURS}),
        _with_header({"__metadata__": OURS, "base_model.model.a": {}}),
        _with_header({"__metadata__": OURS, "base_model.model.a": {"data_offsets": [8, 4]}}),
        _with_header({"__metadata__": OURS, "base_model.model.a": {"data_offsets": ["0", "4"]}}),
    ],
)
def test_what_is_no_checkpoint_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no adapter"):
        peft_directory(reader_of(data))
