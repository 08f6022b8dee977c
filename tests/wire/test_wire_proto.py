"""Our protobuf schema and the SDK's live in one process and are the same on the wire."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tinker.proto import tinker_public_pb2 as sdk_pb

from treadle.wire import treadle_pb2 as pb

# Our name of each message, and the SDK's.
MESSAGES = {
    "PassRequest": "ForwardBackwardRequest",
    "LossSetting": "LossConfigValue",
    "DatumMessage": "Datum",
    "InputChunk": "Chunk",
    "TextChunk": "EncodedTextChunk",
    "ImageChunk": "ImageChunk",
    "DmelChunk": "DmelChunk",
    "TensorMessage": "Tensor",
    "SparseRows": "SparseCsr",
    "ProvenanceSpan": "ProvenanceSpan",
    "PassOutput": "ForwardBackwardOutput",
    "OutputRecord": "ArrayRecord",
    "RaggedTensor": "BatchedTensor",
    "SampleOutput": "SampleResponse",
    "SequenceMessage": "SampledSequence",
    "TopkMessage": "TopkLogprobs",
    "AltTokens": "PromptAltTokens",
}
ENUMS = {"ElementType": "DType", "StopReasonCode": "StopReason"}


def _shape(field):
    return (field.type, field.is_repeated, field.has_presence)


def test_every_message_of_ours_is_compared():
    assert set(pb.DESCRIPTOR.message_types_by_name) == {*MESSAGES, "SpanRange"}
    assert set(pb.DESCRIPTOR.enum_types_by_name) == set(ENUMS)
    assert pb.DESCRIPTOR.package == "treadle.wire.v1"


@pytest.mark.parametrize(("ours", "sdks"), MESSAGES.items())
def test_field_numbers_and_types_are_the_sdks(ours, sdks):
    mine = pb.DESCRIPTOR.message_types_by_name[ours].fields_by_number
    theirs = sdk_pb.DESCRIPTOR.message_types_by_name[sdks].fields_by_number
    for number, field in mine.items():
        assert _shape(field) == _shape(theirs[number]), (ours, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for part in (1, 2):
                mine_part = field.message_type.fields_by_number[part]
                assert _shape(mine_part) == _shape(theirs[number].message_type.fields_by_number[part])
    # override_dimensions is never set by any SDK.
    assert set(theirs) - set(mine) <= ({4} if ours == "ImageChunk" else set())


@pytest.mark.parametrize(("ours", "sdks"), ENUMS.items())
def test_enum_values_are_the_sdks(ours, sdks):
    mine = pb.DESCRIPTOR.enum_types_by_name[ours].values_by_number
    assert set(mine) == set(sdk_pb.DESCRIPTOR.enum_types_by_name[sdks].values_by_number)


def test_both_schemas_load_when_ours_comes_first():
    # The other order is this file's own.
    code = "import treadle.wire.treadle_pb2; from tinker.proto import tinker_public_pb2"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_the_wire_package_imports_no_model_libraries():
    code = (
        "import sys, treadle.wire.ops, treadle.wire.payloads, treadle.wire.results, treadle.wire.compression\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'sqlalchemy', 'tinker'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
