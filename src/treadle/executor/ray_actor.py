"""The actor that is a worker: it carries messages between a Ray process and the service of serving.py.

Its methods are calls of Ray: `put` hands messages in, `take` waits for messages that go out. It refuses to know the
scheduler and Ray's interface. Invariant: messages are put in the order of their numbers, in whatever order the calls
come, and taken in the order in which they were sent.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import stat
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import ray

from treadle.errors import ServerError
from treadle.executor.messages import FromWorker, ToWorker, WorkerConfig
from treadle.telemetry.logs import configure_logging
from treadle.worker.staging import staging_place


class WorkerActor:
    """One worker in a process that Ray started; a spare until `begin`."""

    def __init__(self) -> None:
        # A worker's log goes to standard error, whatever prints it.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        # Here: the process that makes actors knows this class, and has no use for torch.
        from treadle.executor.serving import WorkerService

        # Pickled messages; at the end the service's exit status.
        self._outbox: queue.SimpleQueue[bytes | int] = queue.SimpleQueue()
        self._service = WorkerService(self._send)
        self._early: dict[int, bytes] = {}
        self._next_number = 0

    def warm_up(self) -> None:
        """What a spare has the time for."""
        from treadle.worker.build import warm_up

        warm_up()

    def begin(self, config: bytes) -> tuple[int, str]:
        """Become the worker of a pickled WorkerConfig: the process id, and the Ray node that it is one of."""
        worker_config: WorkerConfig = pickle.loads(config)
        configure_logging(level=worker_config.log_level, style=worker_config.log_format)
        threading.Thread(target=self._run, args=(worker_config,), name="treadle-worker", daemon=True).start()
        return os.getpid(), str(ray.get_runtime_context().get_node_id())

    def put(self, number: int, message: bytes) -> None:
        """Hand in message `number`, pickled; they are counted from 0."""
        self._early[number] = message
        while (ready := self._early.pop(self._next_number, None)) is not None:
            self._next_number += 1
            taken: ToWorker = pickle.loads(ready)
            self._service.put(taken)

    def take(self) -> list[bytes | int]:
        """What goes out, pickled, once there is something; an exit status is the last."""
        taken = [self._outbox.get()]
        while not self._outbox.empty():
            taken.append(self._outbox.get())
        return taken

    def _run(self, config: WorkerConfig) -> None:
        status = 1
        try:
            status = self._service.run(on_this_host(config))
        finally:
            self._outbox.put(status)

    def _send(self, message: FromWorker) -> None:
        self._outbox.put(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def on_this_host(config: WorkerConfig) -> WorkerConfig:
    """The same with directories of this host in place of those that only the server's has.

    A directory's replacement has a name that follows from its own, so that the next worker here finds what this one
    left. Raises ServerError when somebody else has taken it.
    """
    return replace(
        config,
        parking_dir=_place(config.parking_dir, Path(tempfile.gettempdir())),
        staging_dir=_staging_place(config),
    )


def _staging_place(config: WorkerConfig) -> str | None:
    """The one of the blobs and this user, as of any server here: what others left there is for the same blobs."""
    wanted = config.staging_dir
    if wanted is None or _can_be_made(wanted):
        return wanted
    temporary = Path(tempfile.gettempdir())
    return str(staging_place(config.blobs_url, temporary / _private_name(f"{config.blobs_url} {wanted}")))


def _can_be_made(directory: str) -> bool:
    parent = Path(directory).parent
    return parent.is_dir() and os.access(parent, os.W_OK)


def _private_name(wanted: str) -> str:
    return f"treadle-{os.getuid()}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}"


def _place(wanted: str | None, instead: Path) -> str | None:
    if wanted is None or _can_be_made(wanted):
        return wanted
    directory = instead / _private_name(wanted)
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ServerError(f"{directory} is not a private directory of this worker's user")
    return str(directory)
