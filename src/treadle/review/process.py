"""One question to one throw-away process: started, asked once, ended, whatever it does. The server's side.

It imports no torch and believes nothing: an answer is bytes up to a bound, within a time. It blocks, so it belongs into
a thread; `kill` may be called from any other. Invariant: when `ask` has returned, the process is gone.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO, Literal

from treadle.errors import InvalidRequest, ServerError
from treadle.review.confine import NAMESPACES, SYSTEM_CALLS

Mode = Literal["trace", "dry_run"]

# What keeps a file from the rest of the machine. Limits alone bound only what it costs.
FULL = frozenset((SYSTEM_CALLS,))
# Until the child has imported what it needs: seconds, on a machine that is busy.
START_S = 60.0
MAX_ANSWER_BYTES = 256 * 2**10
_MAX_LINE_BYTES = 1_024
# No secrets: nothing of the server's environment. One thread, and no device.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "LC_ALL": "C.UTF-8",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child said. isolation: the parts that it took from itself before it was asked; see confine.py."""

    isolation: tuple[str, ...]
    body: bytes


class ReviewProcess:
    """One child. timeout_s: wall-clock seconds from the question to the end. needs: parts without which nothing is
    asked."""

    def __init__(self, mode: Mode, *, timeout_s: float, needs: frozenset[str] = FULL) -> None:
        self._mode = mode
        self._timeout_s = timeout_s
        self._needs = needs
        self._process: subprocess.Popen[bytes] | None = None
        self._is_killed = False

    def ask(self, request: bytes) -> Answer:
        """The answer. Raises InvalidRequest for what the request made the child do: too long, too much, an end of its
        own; ServerError when the child could not be had, and nothing of the request was looked at."""
        with tempfile.TemporaryDirectory(prefix="treadle-review-") as directory:
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "treadle.review.child", self._mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env=_ENVIRONMENT,
                close_fds=True,
                start_new_session=True,
                bufsize=0,
            )
            self._process = process
            if self._is_killed:
                process.kill()
            with process:
                try:
                    return self._asked(process, request)
                finally:
                    process.kill()

    def kill(self) -> None:
        """End it, whatever it does. Idempotent."""
        self._is_killed = True
        if self._process is not None:
            self._process.kill()

    def _asked(self, process: subprocess.Popen[bytes], request: bytes) -> Answer:
        assert process.stdin is not None
        assert process.stdout is not None
        isolation = self._isolation(process.stdout)
        deadline = time.monotonic() + self._timeout_s
        body = _exchanged(process.stdin, process.stdout, request, deadline)
        if body is None:
            raise InvalidRequest(f"it took longer than {self._timeout_s:g} s")
        if len(body) > MAX_ANSWER_BYTES:
            raise InvalidRequest(f"it wrote over {MAX_ANSWER_BYTES} bytes of output")
        try:
            status = process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise InvalidRequest(f"it took longer than {self._timeout_s:g} s") from None
        if status != 0 or not body:
            raise InvalidRequest(_end_in_words(status))
        return Answer(isolation, body)

    def _isolation(self, output: IO[bytes]) -> tuple[str, ...]:
        """What the child took from itself. Raises ServerError when that is not enough, or it did not start."""
        line = _first_line(output, time.monotonic() + START_S)
        if line is None:
            if self._is_killed:
                raise ServerError("the server is stopping")
            raise ServerError("the process of the review did not start; nothing was executed")
        parts = tuple(str(part) for part in json.loads(line))
        if not self._needs <= set(parts):
            raise ServerError(
                f"files cannot be kept from this machine: it lacks {', '.join(sorted(self._needs - set(parts)))} "
                "(Linux on x86_64 or aarch64 has it); nothing was executed"
            )
        return parts


def _first_line(output: IO[bytes], deadline: float) -> bytes | None:
    """What comes before the first line's end; None when nothing did in time. Read byte by byte, to take no more."""
    line = b""
    while len(line) < _MAX_LINE_BYTES:
        if not _is_ready(output, deadline):
            return None
        byte = os.read(output.fileno(), 1)
        if byte == b"\n":
            return line
        if not byte:
            return None
        line += byte
    return None


def _is_ready(output: IO[bytes], deadline: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        return bool(selector.select(max(deadline - time.monotonic(), 0)))


def _exchanged(to: IO[bytes], source: IO[bytes], request: bytes, deadline: float) -> bytes | None:
    """Everything the child writes until it closes its output, up to a little over MAX_ANSWER_BYTES, while the request
    is written; None when the time is over."""
    answer = bytearray()
    waiting = memoryview(request)
    os.set_blocking(to.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        selector.register(to, selectors.EVENT_WRITE)
        while len(answer) <= MAX_ANSWER_BYTES:
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                return None
            for key, _ in ready:
                if key.fileobj is source:
                    part = os.read(source.fileno(), 2**16)
                    if not part:
                        return bytes(answer)
                    answer += part
                    continue
                waiting = _written(to, waiting)
                if not waiting:
                    selector.unregister(to)
                    to.close()
    return bytes(answer)


def _written(to: IO[bytes], waiting: memoryview) -> memoryview:
    """What is left to write. A child that reads no more has nothing left."""
    try:
        return waiting[os.write(to.fileno(), waiting) :]
    except BrokenPipeError:
        return waiting[:0]


def _end_in_words(status: int) -> str:
    if -status in (signal.SIGKILL, signal.SIGXCPU):
        return "it was ended by the system: over its processor time or its memory"
    if status < 0:
        return f"its process was ended by signal {-status}, without an answer"
    return f"its process ended itself without an answer (status {status})"


__all__ = ["FULL", "MAX_ANSWER_BYTES", "NAMESPACES", "START_S", "Answer", "Mode", "ReviewProcess"]
