"""Which sampled sequence is behind each token of a datum, and what that gives the datum's loss.

A client claims it in spans; this module holds the claims against what was recorded when the sequences were sampled. It
refuses to know how records are kept and what a loss makes of them. Invariant: an input that leaves here was recorded by
the server for exactly the token that it stands beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.domain.losses import SAMPLED_RUNS, SAMPLING_LOGPROBS
from treadle.domain.stability import RecordedSequence
from treadle.errors import InvalidRequest

_MODEL_INPUT = "model_input"
_LOSS_FN_INPUTS = "loss_fn_inputs"
# float32 counts so far without a gap; a datum has far fewer tokens.
_MAX_RUNS = 2**24
# Far over what a client's own rounding of float32 may do, far under any other policy's log-probability.
_LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens: positions [offset, offset + length) of a sequence's sampled tokens, or of its prompt."""

    sequence_id: str
    offset: int
    length: int
    is_sampled: bool


@dataclass(frozen=True, slots=True)
class Provenance:
    """Spans that tile a datum's tokens, and spans that tile its target_tokens, in order and without holes."""

    model_input: tuple[Span, ...]
    targets: tuple[Span, ...]

    def sequence_ids(self) -> set[str]:
        """All sequences that are named."""
        return {span.sequence_id for span in (*self.model_input, *self.targets)}


def sampling_inputs(
    datum_index: int,
    provenance: Provenance | None,
    tokens: NDArray[np.int32],
    inputs: Mapping[str, NDArray[np.generic]],
    records: Mapping[str, RecordedSequence],
) -> dict[str, NDArray[np.float32]]:
    """What the server adds to a datum [T] that is trained on sampled sequences: float32 [T] each.

    sampling_logprobs: as recorded, 0 where the target was not sampled. sampled_runs: 0 there; elsewhere the number,
    from 1 on, of the run of consecutive tokens of one sequence that the target belongs to.
    Raises InvalidRequest, naming the datum and the sequence, for claims that the records do not bear out, for an
    advantage on a token that was not sampled, and for logprobs of the client's own that are others.
    """
    if provenance is None:
        raise InvalidRequest(
            f"datum {datum_index}: stable_reinforce needs its provenance: spans that name the sampled sequence behind "
            "each token (Datum.with_provenance)"
        )
    _sampled_rows(datum_index, _MODEL_INPUT, provenance.model_input, tokens, records)
    logprobs = np.zeros(len(tokens), dtype=np.float32)
    runs = np.zeros(len(tokens), dtype=np.float32)
    run = 0
    # Where the run so far would go on: a row of the datum, and a token of a sequence.
    next_place: tuple[int, str, int] | None = None
    targets = inputs["target_tokens"]
    for span, rows, record in _sampled_rows(datum_index, _LOSS_FN_INPUTS, provenance.targets, targets, records):
        run += (rows.start, span.sequence_id, span.offset) != next_place
        next_place = (rows.stop, span.sequence_id, span.offset + span.length)
        runs[rows] = run
        logprobs[rows] = record.sampling_logprobs()[span.offset : span.offset + span.length]
    assert run < _MAX_RUNS
    _check_advantages(datum_index, inputs["advantages"], runs)
    if "logprobs" in inputs:
        _check_logprobs(datum_index, inputs["logprobs"], logprobs, runs)
    return {SAMPLING_LOGPROBS: logprobs, SAMPLED_RUNS: runs}


def _sampled_rows(
    datum_index: int,
    field: str,
    spans: Iterable[Span],
    ids: NDArray[np.generic],
    records: Mapping[str, RecordedSequence],
) -> list[tuple[Span, slice, RecordedSequence]]:
    """The sampled spans that are not empty, with their rows and records; all spans are checked."""
    found = []
    row = 0
    for span in spans:
        record = records.get(span.sequence_id)
        if record is None:
            raise InvalidRequest(
                f"datum {datum_index}: sequence {span.sequence_id[:200]!r} is not on record: this session did not "
                "sample it with record_stability_info, or did not use it for too long"
            )
        _check_within(datum_index, field, span, record)
        rows = slice(row, row + span.length)
        row += span.length
        if span.is_sampled and span.length:
            _check_tokens(datum_index, field, span, rows, ids, record)
            found.append((span, rows, record))
    assert row == len(ids), "spans tile their field"
    return found


def _check_within(datum_index: int, field: str, span: Span, record: RecordedSequence) -> None:
    size = record.num_tokens if span.is_sampled else record.num_prompt_tokens
    if span.offset + span.length > size:
        what = "sampled tokens" if span.is_sampled else "a prompt"
        raise InvalidRequest(
            f"datum {datum_index}: a span of {field} names positions [{span.offset}, {span.offset + span.length}) of "
            f"sequence {span.sequence_id!r}, which has {what} of length {size}"
        )


def _check_tokens(
    datum_index: int, field: str, span: Span, rows: slice, ids: NDArray[np.generic], record: RecordedSequence
) -> None:
    sampled = record.token_ids()[span.offset : span.offset + span.length]
    is_other = ids[rows] != sampled
    if is_other.any():
        place = int(np.argmax(is_other))
        name = "target_tokens" if field == _LOSS_FN_INPUTS else field
        raise InvalidRequest(
            f"datum {datum_index}: {name}[{rows.start + place}] is {ids[rows][place]}, but token {span.offset + place} "
            f"of sequence {span.sequence_id!r} is {sampled[place]}"
        )


def _check_advantages(datum_index: int, advantages: NDArray[np.generic], runs: NDArray[np.float32]) -> None:
    is_stray = (advantages != 0) & (runs == 0)
    if is_stray.any():
        position = int(np.argmax(is_stray))
        raise InvalidRequest(
            f"datum {datum_index}: advantages[{position}] is {advantages[position]}, but the target there is not in a "
            "sampled span; stable_reinforce takes advantages other than 0 on sampled tokens only"
        )


def _check_logprobs(
    datum_index: int,
    given: NDArray[np.generic],
    recorded: NDArray[np.float32],
    runs: NDArray[np.float32],
) -> None:
    difference = np.abs(given.astype(np.float64) - recorded)
    is_other = (difference > _LOGPROB_TOLERANCE * np.maximum(1.0, np.abs(recorded))) & (runs != 0)
    if is_other.any():
        position = int(np.argmax(is_other))
        raise InvalidRequest(
            f"datum {datum_index}: logprobs[{position}] is {given[position]}, but {recorded[position]} was recorded "
            "when the token was sampled, and stable_reinforce reads the record; leave logprobs out"
        )
