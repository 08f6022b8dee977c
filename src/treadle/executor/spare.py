"""Starting a worker process and its pipe, and keeping one in reserve.

Importing torch and the model code takes seconds of a core, and a dead worker's clients wait for them. So a spare has
imported everything and waits on its pipe for a WorkerConfig, which makes it a worker. It holds no model, is nobody's
worker and takes no processor time. It refuses to know models and messages.
Invariant: whoever takes a process owns it; the spare never outlives this process, because its pipe ends with it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# What is started as a worker, followed by the number of its end of the pipe.
WORKER_COMMAND = (sys.executable, "-m", "treadle.executor.child")


@dataclass(frozen=True, slots=True)
class StartedProcess:
    """A worker process and our end of its pipe."""

    command: tuple[str, ...]
    process: subprocess.Popen[bytes]
    connection: Connection

    def kill(self) -> None:
        """End it, whatever it does. Idempotent."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def start_process(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> StartedProcess:
    """A process that imports what a worker needs and waits for its configuration on the pipe.

    environment: the process's own, None for this one's. Raises OSError when the command cannot be run.
    """
    ours, theirs = Pipe(duplex=True)
    # A session of its own: Ctrl-C reaches the server only, which then drains before it stops the worker.
    process = subprocess.Popen(
        [*command, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    theirs.close()
    return StartedProcess(tuple(command), process, ours)


class Spare:
    """At most one process in reserve, for all workers of this server. For one thread."""

    def __init__(self) -> None:
        self._waiting: StartedProcess | None = None
        self._is_stopped = False

    def take(self, command: Sequence[str]) -> StartedProcess | None:
        """The spare, if there is one that lives and was started by this command; the caller's from now on."""
        spare = self._waiting
        if spare is None or spare.command != tuple(command):
            return None
        self._waiting = None
        if (status := spare.process.poll()) is not None:
            log.warning("spare worker had died", status=status)
            spare.connection.close()
            return None
        return spare

    def prepare(self, command: Sequence[str]) -> None:
        """Start a spare unless there is one."""
        if self._is_stopped or self._waiting is not None:
            return
        try:
            self._waiting = start_process(command)
        except OSError as error:
            log.warning("spare worker not started", reason=str(error))
        else:
            log.info("spare worker started", pid=self._waiting.process.pid)

    def stop(self) -> None:
        """End the spare for good. Idempotent."""
        self._is_stopped = True
        if self._waiting is not None:
            self._waiting.kill()
            self._waiting = None
