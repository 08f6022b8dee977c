"""The local worker process: `python -m treadle.executor.child FD`, started by executor/local.py.

Until its configuration comes it is a spare: everything is imported, nothing is loaded. Then it serves (serving.py). The
reader thread exits the process the moment the pipe closes, so a worker never outlives its server.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection

from treadle.executor.messages import ToWorker, WorkerConfig
from treadle.executor.serving import WorkerService
from treadle.telemetry.logs import configure_logging
from treadle.worker.build import warm_up


class ChildProcess:
    """One worker process's life: wait for a configuration, then serve messages until told to stop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.service = WorkerService(connection.send)

    def main(self) -> int:
        """Run until stopped; the exit status."""
        if not self._connection.poll():
            warm_up()  # a spare has the time
        try:
            config: WorkerConfig = self._connection.recv()
        except (EOFError, OSError):
            return 0  # a spare that was never needed
        configure_logging(level=config.log_level, style=config.log_format)
        threading.Thread(target=self._read_forever, name="treadle-pipe-reader", daemon=True).start()
        return self.service.run(config)

    def _read_forever(self) -> None:
        while True:
            try:
                message: ToWorker = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the server is gone; no orphan may hold the device
            self.service.put(message)


def main() -> int:
    """Entry point; the pipe's file descriptor is the only argument."""
    # The server reserves stdout for its ready line; a library that prints must not break it.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return ChildProcess(Connection(int(sys.argv[1]))).main()


if __name__ == "__main__":
    status = main()
    # Skip interpreter teardown: daemon threads may still hold library locks.
    sys.stderr.flush()
    os._exit(status)
