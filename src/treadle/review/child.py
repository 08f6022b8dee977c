"""The process of one review: `python -I -m treadle.review.child trace|dry_run`. See the package.

Before it is given anything it says what it took from itself, one line of JSON; then it reads one request from standard
input, to its end, answers on standard output, and ends. It is started with an empty environment, in an empty directory,
with no other descriptors. Invariant: nothing of the request is looked at before `lock` has returned.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from treadle.review.confine import Bounds, enter_namespaces, lock

# Beyond the memory that the imports take. Of a dry run: as much as a loss may take in a worker, four times.
_BOUNDS = {
    "trace": Bounds(cpu_s=10, memory_bytes=512 * 2**20),
    "dry_run": Bounds(cpu_s=60, memory_bytes=2 * 2**30),
}


def main(mode: str) -> None:
    """Never returns."""
    parts = enter_namespaces()
    job = _job(mode)
    parts += lock(_BOUNDS[mode], has_namespaces=bool(parts))
    # Standard output carries the answer and nothing else.
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None  # type: ignore[misc]
    _write(json.dumps(parts).encode() + b"\n")
    _write(job(_read()))
    # Not through the interpreter's end, where a stranger's code could still have a word.
    os._exit(0)


def _job(mode: str) -> Callable[[bytes], bytes]:
    """What answers a request, with everything imported and run once: nothing can be opened later."""
    # Imported here because namespaces are entered with one thread, and these libraries start more.
    if mode == "trace":
        from treadle.review.jobs import ready_to_trace

        return ready_to_trace()
    from treadle.review.jobs import ready_to_run

    return ready_to_run()


def _read() -> bytes:
    parts = []
    while part := os.read(0, 2**16):
        parts.append(part)
    return b"".join(parts)


def _write(answer: bytes) -> None:
    while answer:
        answer = answer[os.write(1, answer) :]


if __name__ == "__main__":
    main(sys.argv[1])
