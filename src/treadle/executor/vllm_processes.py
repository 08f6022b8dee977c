"""vLLM's processes as one transport: the child that speaks with the server, and the engine's that it starts.

They share a session of their own. Whatever ends the child, the others are ended as well, at once: they hold the device.
Python's resource tracker among them is left alone, because it then removes their shared memory and goes by itself.
Invariant: when `wait` has returned, no process of vLLM computes any more.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from treadle.executor.pipe import PipeTransport
from treadle.executor.spare import StartedProcess

_POLL_S = 0.05
_TRACKER = b"multiprocessing.resource_tracker"
# How long the tracker may take to clean up, and processes to be gone.
_GONE_WITHIN_S = 5.0


class VllmTransport(PipeTransport):
    """See Transport. The child leads its process group. directory: of its files, removed behind it."""

    def __init__(self, started: StartedProcess, directory: str) -> None:
        super().__init__(started)
        self._group = started.process.pid
        self.directory = directory

    def kill(self) -> None:
        """See Transport.kill."""
        end_group(self._group)

    def wait(self, timeout_s: float | None = None) -> str | None:
        """See Transport.wait."""
        if not _has_ended(self._group, timeout_s):
            return None
        # Before the child is reaped: until then nobody else can have its number.
        end_group(self._group)
        shutil.rmtree(self.directory, ignore_errors=True)
        return super().wait()


def end_others(group: int) -> None:
    """Kill every other process of the group but Python's resource trackers."""
    for pid in members(group):
        if pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def end_group(group: int) -> None:
    """The same for a group that this process is not in, and wait for it; trackers too when they stay."""
    end_others(group)
    deadline = time.monotonic() + _GONE_WITHIN_S
    while any(True for _ in members(group, with_trackers=True)):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            return
        time.sleep(_POLL_S)


def members(group: int, *, with_trackers: bool = False) -> Iterator[int]:
    """Living processes of the group."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # Behind the name, which may hold anything: state, parent, group.
            state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            is_tracker = _TRACKER in (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue  # It has ended meanwhile.
        if int(process_group) == group and state != "Z" and (with_trackers or not is_tracker):
            yield int(entry.name)


def _has_ended(pid: int, timeout_s: float | None) -> bool:
    """Whether the child has, which stays a zombie."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    flags = os.WEXITED | os.WNOWAIT
    try:
        if deadline is None:
            return os.waitid(os.P_PID, pid, flags) is not None
        while os.waitid(os.P_PID, pid, flags | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
    except ChildProcessError:
        pass  # Another thread has waited for it.
    return True
