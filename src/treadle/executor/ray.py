"""An executor whose worker is an actor of a Ray cluster.

All workers of a server share one process that speaks to Ray (ray_process.py says why it is a process of its own); each
has a pipe to it. What is done with messages is in channel.py, as for a local worker. This file does not import Ray.
Invariant: the end of that process, of the cluster, of a node and of an actor is each the death of the workers concerned
and of nothing else; the next worker that is started finds or makes what it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from treadle.config import ExecutorSettings
from treadle.config.sources import environment_of_tool
from treadle.domain.limits import HANG_AFTER_S
from treadle.domain.roles import Role
from treadle.errors import ConfigError
from treadle.executor.base import PartsCallback
from treadle.executor.channel import Channel
from treadle.executor.messages import FromWorker, ToWorker, WorkerConfig
from treadle.executor.ray_forms import ActorEnded, ActorStarted, ClusterConfig, OpenWorker
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# Settings of Ray's that nobody should have to set: no statistics are sent, and each line of a worker is shown once.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
# How long the Ray process may take to end an actor that was given up, and to end itself.
KILL_TIMEOUT_S = 15.0


class RayCluster:
    """The process that speaks to Ray, for all Ray workers of a server. It starts with the first of them.

    Raises ConfigError when Ray is not installed.
    """

    def __init__(
        self,
        settings: ExecutorSettings,
        *,
        keeps_spare: bool = True,
        log_level: str = "info",
        log_format: str = "console",
    ) -> None:
        if find_spec("ray") is None:
            raise ConfigError("executor ray needs the extra: pip install 'treadle[ray]'")
        self.settings = settings
        self._config = ClusterConfig(
            address=settings.ray_address,
            object_store_bytes=settings.object_store_bytes,
            name=f"treadle-{os.urandom(6).hex()}",
            keeps_spare=keeps_spare,
            log_level=log_level,
            log_format="json" if log_format == "json" else "console",
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process that speaks to Ray, while there is one."""
        return None if self._process is None else self._process.pid

    def open(self, ask: OpenWorker) -> Connection:
        """The pipe of a worker that is being started. It does not block."""
        ours, theirs = Pipe(duplex=True)
        with self._lock:
            for _ in range(2):
                # A process that died a moment ago is found out by the send.
                try:
                    socket.send_fds(self._control_of_process(), [pickle.dumps(ask)], [theirs.fileno()])
                    break
                except OSError:
                    self._forget_process()
        theirs.close()
        return ours

    async def stop(self) -> None:
        """Leave the cluster, and end it if it is our own. Idempotent; workers are stopped before."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        with self._lock:
            if self._process is None:
                return
            if self._control is not None:
                self._control.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_TIMEOUT_S)
            self._forget_process()

    def _control_of_process(self) -> socket.socket:
        if self._process is not None and _has_ended(self._process):
            self._forget_process()
        if self._process is None or self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "treadle.executor.ray_process", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment_of_tool(_ENVIRONMENT),
                    start_new_session=True,
                )
            self._control = ours
            ours.send(pickle.dumps(self._config))
            log.info("Ray process started", pid=self._process.pid, address=self._config.address or "own cluster")
        return self._control

    def _forget_process(self) -> None:
        """End the process and what it has started, its own cluster included."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            # It leads a group of processes, and its number is nobody else's until it has been waited for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, without taking its number away from it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class RayTransport:
    """See Transport: one actor, behind the Ray process."""

    def __init__(self, pipe: Connection, name: str) -> None:
        self._pipe = pipe
        self._name = name
        self._reason = "the process that speaks to Ray ended"
        self._is_received = False
        self._ended = threading.Event()
        self._killed_at: float | None = None
        self.started: ActorStarted | None = None

    def send(self, message: ToWorker) -> None:
        """See Transport.send."""
        self._pipe.send(message)

    def receive(self) -> FromWorker:
        """See Transport.receive."""
        self._is_received = True
        try:
            while True:
                message: FromWorker | ActorStarted | ActorEnded = self._pipe.recv()
                if isinstance(message, ActorEnded):
                    self._reason = message.reason
                    raise EOFError
                if not isinstance(message, ActorStarted):
                    return message
                self.started = message
        except (EOFError, OSError):
            self._ended.set()
            raise

    def kill(self) -> None:
        """See Transport.kill. The Ray process hears the end of the pipe."""
        self._killed_at = self._killed_at or time.monotonic()
        self._shut(socket.SHUT_WR)

    def wait(self, timeout_s: float | None = None) -> str | None:
        """See Transport.wait."""
        if not self._is_received and self._killed_at is not None:
            threading.Thread(target=self._drain, name="treadle-ray-drain", daemon=True).start()
        if timeout_s is None and self._killed_at is not None:
            self._ended.wait(KILL_TIMEOUT_S)
            self._shut(socket.SHUT_RDWR)
        return self._reason if self._ended.wait(timeout_s) else None

    def _drain(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.receive()

    def _shut(self, how: int) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.shutdown(how)


class RayExecutor(Channel):
    """One Ray actor. `start` may be called once; after a death make a new executor."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        cluster: RayCluster,
        role: Role = Role.BOTH,
        name: str = "",
        hang_after_s: float = HANG_AFTER_S,
        on_parts: PartsCallback | None = None,
    ) -> None:
        """Raises ConfigError when device and reservation do not fit."""
        super().__init__(role=role, name=name or config.base_model, hang_after_s=hang_after_s, on_parts=on_parts)
        settings, is_sampler = cluster.settings, role is Role.SAMPLING
        num_gpus = settings.sampler_num_gpus if is_sampler else settings.num_gpus
        self._cluster = cluster
        self._ask = OpenWorker(
            name=self.name,
            config=replace(
                config,
                device=_device(config.device, num_gpus),
                source=_absolute(config.source) if Path(config.source).is_dir() else config.source,
                blobs_url=config.blobs_url if "://" in config.blobs_url else _absolute(config.blobs_url),
            ),
            num_cpus=settings.sampler_num_cpus if is_sampler else settings.num_cpus,
            num_gpus=num_gpus,
        )

    @property
    def pid(self) -> int | None:
        """The actor's process id on its node, once it runs."""
        return None if self.started is None else self.started.pid

    @property
    def started(self) -> ActorStarted | None:
        """What is known of the actor, once it runs."""
        return self._transport.started if isinstance(self._transport, RayTransport) else None

    def _open(self) -> RayTransport:
        return RayTransport(self._cluster.open(self._ask), self.name)


def _absolute(path: str) -> str:
    """Actors run in directories of their own."""
    return str(Path(path).absolute())


def _device(device: str, num_gpus: float) -> str:
    """The device of an actor, to which Ray shows the GPUs that it has reserved and no others."""
    if num_gpus == 0:
        if device.startswith("cuda"):
            raise ConfigError(f"engine.device is {device}, and executor.num_gpus reserves none: set it above 0")
        return "cpu"
    if device == "cpu":
        raise ConfigError("engine.device is cpu, and executor.num_gpus reserves GPUs: one of them must change")
    if device not in ("auto", "cuda", "cuda:0"):
        raise ConfigError(f"engine.device is {device}: Ray chooses the GPU, so leave it at auto or cuda")
    return "cuda:0"
