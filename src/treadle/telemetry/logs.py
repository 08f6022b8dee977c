"""Structured logging on top of the standard library: one short event and its fields per line.

    log = get_logger(__name__)
    log.info("cycle finished", cycle=1, tokens=2)

It refuses to know what is logged, and configures nothing at import: `configure_logging` is called once, by the process
that owns standard error. Invariants: an event without a traceback is exactly one line, whatever its fields contain; and
no line has more than the prefix of what looks like a key or a token, tracebacks and other libraries' lines included.
Which request, run or cycle a line belongs to is bound once (context.py), not passed to every event.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Literal, TextIO

from treadle.masking import masked
from treadle.telemetry.context import bind_context, current_context, log_context

__all__ = ["Logger", "bind_context", "configure_logging", "get_logger", "log_context"]

_ROOT = "treadle"
_FIELDS = "treadle_fields"


class Logger:
    """Writes events with fields. Levels: info = a state changed, warning = degraded but served, error = our fault."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, *, exc: BaseException | None = None, **fields: object) -> None:
        """`exc` adds its traceback, which stays in the log: clients only ever see a request id."""
        self._write(logging.ERROR, event, fields, exc)

    def _write(self, level: int, event: str, fields: Mapping[str, object], exc: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            extra = {_FIELDS: {**current_context(), **fields}}
            self._logger.log(level, "%s", event, extra=extra, exc_info=exc)


def get_logger(name: str) -> Logger:
    """The logger of a module; pass `__name__`."""
    return Logger(logging.getLogger(name))


def configure_logging(
    *,
    level: str = "info",
    style: Literal["console", "json"] = "console",
    stream: TextIO | None = None,
) -> None:
    """Sends our events from `level` on, and other libraries' warnings, to `stream`. Replaces earlier calls.

    stream None is standard error. Standard output stays free for what commands print.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT).setLevel(level.upper())


class _JsonFormatter(logging.Formatter):
    """One JSON object per line; a traceback is one of its fields."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        event.update(_fields_of(record))
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return masked(json.dumps(event, default=str))


class _ConsoleFormatter(logging.Formatter):
    """`time level event key=value ...`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields_of(record)
        parts = [_timestamp(record), f"{record.levelname.lower():<7}", " ".join(record.getMessage().splitlines())]
        parts += [f"{key}={_plain(value)}" for key, value in fields.items()]
        line = " ".join(parts)
        return masked(line + "\n" + self.formatException(record.exc_info) if record.exc_info else line)


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    """Ours bring theirs along; a line of another library is written where it came to be, with what is bound there."""
    fields: Mapping[str, object] | None = getattr(record, _FIELDS, None)
    return current_context() if fields is None else fields


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _plain(value: object) -> str:
    """Bare where that is unambiguous, else quoted with control characters escaped."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if text and text.isprintable() and " " not in text and '"' not in text else json.dumps(text)
