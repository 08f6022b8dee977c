"""Provenance spans of a datum: protobuf to domain and back.

It checks the form alone: spans come for both fields or for neither, and tile them. Whether what they claim is true is
domain/provenance.py's to say, and only for a loss that reads it. Invariant: spans that leave here have no holes.
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.domain.limits import MAX_SEQUENCE_ID_CHARS
from treadle.domain.provenance import Provenance, Span
from treadle.errors import InvalidRequest
from treadle.wire import treadle_pb2 as pb


def read_provenance(datum_index: int, datum: pb.DatumMessage, num_rows: int) -> Provenance | None:
    """What a datum of `num_rows` tokens says of where they came from; None when it says nothing.

    Raises InvalidRequest, naming the datum and the field, for spans that do not tile it.
    """
    if not datum.model_input_spans and not datum.loss_fn_input_spans:
        return None
    return Provenance(
        model_input=_read_spans(f"datum {datum_index}: model_input_spans", datum.model_input_spans, num_rows),
        targets=_read_spans(f"datum {datum_index}: loss_fn_input_spans", datum.loss_fn_input_spans, num_rows),
    )


def write_provenance(datum: pb.DatumMessage, provenance: Provenance) -> None:
    """Add the spans to a message that has none."""
    datum.model_input_spans.extend(_span_message(span) for span in provenance.model_input)
    datum.loss_fn_input_spans.extend(_span_message(span) for span in provenance.targets)


def _read_spans(place: str, messages: Sequence[pb.ProvenanceSpan], num_rows: int) -> tuple[Span, ...]:
    if not messages:
        raise InvalidRequest(f"{place} is missing; provenance is both lists of spans or neither")
    # Empty spans are allowed, and cover nothing: without a bound, a body could be all of them.
    if len(messages) > 2 * (num_rows + 1):
        raise InvalidRequest(f"{place} has {len(messages)} spans for {num_rows} tokens")
    spans = tuple(_read_span(f"{place}[{index}]", message) for index, message in enumerate(messages))
    covered = sum(span.length for span in spans)
    if covered != num_rows:
        raise InvalidRequest(f"{place} cover {covered} positions of {num_rows}; they must tile them")
    return spans


def _read_span(place: str, message: pb.ProvenanceSpan) -> Span:
    kind = message.WhichOneof("span")
    if kind is None:
        raise InvalidRequest(f"{place} is neither a span of a prompt nor of sampled tokens")
    is_sampled = kind == "sampled_tokens"
    of = message.sampled_tokens if is_sampled else message.prompt_tokens
    if not of.sequence_id or len(of.sequence_id) > MAX_SEQUENCE_ID_CHARS or "\0" in of.sequence_id:
        raise InvalidRequest(f"{place}: sequence_id {of.sequence_id[:80]!r} is not an id")
    if of.offset < 0 or of.length < 0:
        raise InvalidRequest(f"{place}: offset {of.offset} and length {of.length} must be at least 0")
    return Span(of.sequence_id, of.offset, of.length, is_sampled)


def _span_message(span: Span) -> pb.ProvenanceSpan:
    message = pb.ProvenanceSpan()
    arm = message.sampled_tokens if span.is_sampled else message.prompt_tokens
    arm.sequence_id, arm.offset, arm.length = span.sequence_id, span.offset, span.length
    # An arm whose fields are all at their defaults must be chosen too.
    arm.SetInParent()
    return message
