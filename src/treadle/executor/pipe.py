"""A worker process of this machine and the pipe to it, as a transport.

It refuses to know what the process runs: whoever starts one says which, and sends the first message, its configuration.
Invariant: a process whose pipe has ended is waited for, so that none is left behind as a zombie.
"""

from __future__ import annotations

import subprocess

from treadle.executor.messages import FromWorker, ToWorker
from treadle.executor.spare import StartedProcess


class PipeTransport:
    """See Transport."""

    def __init__(self, started: StartedProcess) -> None:
        self.process = started.process
        self._connection = started.connection

    def send(self, message: ToWorker) -> None:
        """See Transport.send."""
        self._connection.send(message)

    def receive(self) -> FromWorker:
        """See Transport.receive."""
        message: FromWorker = self._connection.recv()
        return message

    def kill(self) -> None:
        """See Transport.kill."""
        self.process.kill()

    def wait(self, timeout_s: float | None = None) -> str | None:
        """See Transport.wait."""
        try:
            status = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return f"the worker process ended with status {status}"
