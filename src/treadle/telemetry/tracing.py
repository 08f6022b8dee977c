"""Traces of requests and cycles, for whoever collects them; off unless the process that serves turns them on.

    if is_tracing():
        root = request_trace(request_id)
        emit(Span("queued", root.child("queued"), parent=root, began_at=queued_at, ended_at=sent_at))

Every process that works on a request derives the same trace id from its id, so gateway, scheduler and worker need tell
each other nothing, and no column holds one. Spans are made when they are over, with the times that are known anyway.
It refuses to know how spans travel (otlp.py), and imports none of that. Like logging, it is one thing per process:
what is emitted goes to the sink that `start_tracing` was given. Invariant: whether a trace is collected depends on its
id and on the ratio alone, so all processes of equal settings decide alike.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

# Links of one span; a cycle may have thousands of requests.
MAX_LINKS = 128

_SPAN_BITS = 64
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")

Attributes: TypeAlias = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class SpanRef:
    """Where a span is: in which trace (128 bits, not 0), under which id (64 bits, not 0)."""

    trace_id: int
    span_id: int

    def child(self, *names: str) -> SpanRef:
        """The place of the part of this span that is called so: the same for everybody who asks."""
        return SpanRef(
            self.trace_id, _number(f"{self.trace_id:032x}/{self.span_id:016x}/{'/'.join(names)}", _SPAN_BITS)
        )

    def new_child(self) -> SpanRef:
        """A place of its own in this trace."""
        return SpanRef(self.trace_id, secrets.randbits(_SPAN_BITS) or 1)


class SpanKind(StrEnum):
    """SERVER: somebody waits for it across the network; INTERNAL: everything else."""

    SERVER = "server"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `began_at` to `ended_at` (epoch seconds) and is over.

    at: its own place; parent: of the span that it is part of. links: what else it belongs to, at most MAX_LINKS.
    error: why it failed, empty when it did not; in words that a log line may have too.
    """

    name: str
    at: SpanRef
    began_at: float
    ended_at: float
    parent: SpanRef | None = None
    kind: SpanKind = SpanKind.INTERNAL
    attributes: Attributes = field(default_factory=dict)
    links: tuple[SpanRef, ...] = ()
    error: str = ""


Sink: TypeAlias = Callable[[Span], None]


@dataclass(slots=True)
class _State:
    """What this process does with spans, as `logging` has its handlers."""

    sink: Sink | None = None
    sample_ratio: float = 1.0


_STATE = _State()


def start_tracing(sink: Sink, *, sample_ratio: float = 1.0) -> Callable[[], None]:
    """Give spans to `sink` from now on; the returned function ends it. sample_ratio: of traces, 0 to 1.

    sink: called on any thread; it must neither block nor raise.
    """
    assert 0.0 <= sample_ratio <= 1.0
    _STATE.sink, _STATE.sample_ratio = sink, sample_ratio

    def end() -> None:
        if _STATE.sink is sink:
            _STATE.sink = None

    return end


def is_tracing() -> bool:
    """Whether anybody collects spans. Ask before making some."""
    return _STATE.sink is not None


def is_collected(at: SpanRef) -> bool:
    """Whether spans of this trace are collected."""
    return is_tracing() and (at.trace_id & (2**64 - 1)) < _STATE.sample_ratio * 2**64


def emit(span: Span) -> None:
    """Hand a span over, if its trace is collected."""
    if is_collected(span.at):
        emit_always(span)


def emit_always(span: Span) -> None:
    """Hand a span over that others link to, whatever is made of its own trace id."""
    if _STATE.sink is not None:
        assert len(span.links) <= MAX_LINKS
        _STATE.sink(span)


def request_trace(request_id: str) -> SpanRef:
    """The root of a request's trace: from its row to its stored result. It is the same wherever it is asked for."""
    return _root("request", request_id)


def cycle_trace(pool: str, token: int, cycle: int) -> SpanRef:
    """The root of a clock cycle's trace. token: of the lease under which it ran; cycle: its number."""
    return _root("cycle", f"{pool}/{token}/{cycle}")


def new_trace() -> SpanRef:
    """The root of a trace of its own."""
    return SpanRef(secrets.randbits(128) or 1, secrets.randbits(_SPAN_BITS) or 1)


def from_traceparent(header: str | None) -> SpanRef | None:
    """The span that a client says its call belongs to (W3C Trace Context); None when it says none that can be read."""
    match = None if header is None else _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    trace_id, span_id = int(match[1], 16), int(match[2], 16)
    return SpanRef(trace_id, span_id) if trace_id and span_id else None


def _root(kind: str, name: str) -> SpanRef:
    text = f"treadle/{kind}/{name}"
    return SpanRef(_number(f"{text}/trace", 128), _number(f"{text}/root", _SPAN_BITS))


def _number(text: str, num_bits: int) -> int:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[: num_bits // 8], "big") or 1
