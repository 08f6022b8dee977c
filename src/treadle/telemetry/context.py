"""What the running task works on: the ids that every log line and every span made inside it carries.

    with log_context(pool=pool, cycle=7):      # from here to the end of the block
        bind_context(request_id=request_id)    # from here to the end of the enclosing block

It refuses to know what the fields mean. Invariants: what is bound inside a block is gone behind it, and another task
never sees it; tasks and `asyncio.to_thread` take along what was bound when they began, plain threads begin with
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

_CONTEXT: ContextVar[Mapping[str, object]] = ContextVar("treadle_log_context", default=MappingProxyType({}))


def current_context() -> Mapping[str, object]:
    """What is bound here."""
    return _CONTEXT.get()


def bind_context(**fields: object) -> None:
    """Add `fields` until the enclosing `log_context` ends; outside of any, for the rest of the task or the process."""
    _CONTEXT.set({**_CONTEXT.get(), **fields})


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Adds `fields` to every event written inside the block, in this task and those it starts."""
    token = _CONTEXT.set({**_CONTEXT.get(), **fields})
    try:
        yield
    finally:
        _CONTEXT.reset(token)
