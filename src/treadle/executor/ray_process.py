"""The process that speaks to Ray for a server: `python -m treadle.executor.ray_process FD`, started by executor/ray.py.

Ray ends a process that has lost its cluster, and a server must not end with it: so this one is the driver, and dies in
the server's place. For each worker it reserves a placement group of one bundle, starts an actor in it, and carries
bytes between the actor and the server, unread. It refuses to know what the messages mean.
Invariant: this process ends with its server, an actor and its reservation with their pipe, and a cluster of this
process's own with this process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from treadle.executor.local import SPARE_AFTER_S
from treadle.executor.messages import LoadFailed
from treadle.executor.ray_actor import WorkerActor
from treadle.executor.ray_forms import ActorEnded, ActorStarted, ClusterConfig, OpenWorker
from treadle.telemetry.logs import configure_logging, get_logger

log = get_logger("treadle.executor.ray_process")

MAX_CONTROL_BYTES = 1 << 20
# How often somebody who reads the log hears that a worker waits for room in the cluster.
_SAY_EVERY_S = 30.0
# How long the head may take to be reached, and the cluster to be joined or started on busy cores.
_REACH_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 120.0
_MAX_REASON_CHARACTERS = 250
_ACTOR_CLASS: dict[str, Any] = {
    # One thread hands messages in, one waits for those that go out.
    "concurrency_groups": {"in": 1, "out": 1},
    # A restarted actor is empty. The server's recovery makes a new one.
    "max_restarts": 0,
    "max_task_retries": 0,
}


class Cluster:
    """A connection to Ray, and what this server has reserved there. For several threads."""

    def __init__(self, config: ClusterConfig) -> None:
        """Raises what Ray raises when there is no such cluster."""
        self.name = config.name
        self.is_own = not config.address
        self.is_left = False
        self._lock = threading.Lock()
        self._reserved: dict[str, Mapping[str, float]] = {}
        self._local_pids: set[int] = set()
        options: dict[str, Any] = {"namespace": config.name, "logging_level": "ERROR", "log_to_driver": True}
        if self.is_own:
            # Not the one that somebody else may have started on this machine.
            options |= {"address": "local", "include_dashboard": False}
            if config.object_store_bytes:
                options |= {"object_store_memory": config.object_store_bytes}
        else:
            options |= {"address": config.address}
        if not self.is_own:
            _check_address(config.address)
        given_up = threading.Timer(_CONNECT_TIMEOUT_S, _give_up, [config.address or "this machine"])
        given_up.daemon = True
        given_up.start()
        ray.init(**options)
        given_up.cancel()
        self.node_id: str = ray.get_runtime_context().get_node_id()

    def missing(self, name: str, bundle: Mapping[str, float]) -> str | None:
        """Why this bundle can never be had with what is reserved already; None when it can, or nodes may join."""
        total = _resources(ray.cluster_resources)
        with self._lock:
            others = [one for other, one in self._reserved.items() if other != name]
        for kind, amount in bundle.items():
            needed = amount + sum(one.get(kind, 0.0) for one in others)
            if self.is_own and needed > total.get(kind, 0.0) + 1e-9:
                return (
                    f"the workers of this server need {needed:g} {kind} together, and this machine's Ray cluster has "
                    f"{total.get(kind, 0.0):g}: lower executor.num_{kind.lower()}s or the number of workers"
                )
        return None

    def reserve(self, name: str, bundle: Mapping[str, float]) -> Any:
        """A placement group that is asked for, not there yet."""
        with self._lock:
            self._reserved[name] = bundle
        return placement_group([dict(bundle)], strategy="STRICT_PACK", name=f"{self.name}/{name}")

    def release(self, name: str, group: Any) -> None:
        """Give a placement group back."""
        with self._lock:
            self._reserved.pop(name, None)
        with contextlib.suppress(Exception):  # the cluster may be gone, and the group with it
            remove_placement_group(group)

    def note_local(self, pid: int, *, is_there: bool) -> None:
        """An actor's process on this machine."""
        with self._lock:
            (self._local_pids.add if is_there else self._local_pids.discard)(pid)

    def kill_local(self) -> None:
        """End the actors' processes of this machine without asking Ray."""
        with self._lock:
            for pid in self._local_pids:
                _kill(pid)


class Spare:
    """At most one actor in reserve, on the node of the worker that came last. For several threads.

    It has no GPU, so only a worker without one takes it; what such a worker reserves stays reserved by its group.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actor: Any = None
        self._node_id = ""

    def take(self, node_id: str) -> Any:
        """The spare, the caller's from now on, if there is one on this node."""
        with self._lock:
            if self._node_id != node_id:
                return None
            actor, self._actor, self._node_id = self._actor, None, ""
            return actor

    def prepare(self, node_id: str) -> None:
        """Start one on this node, unless there is one."""
        with self._lock:
            if self._actor is not None and self._node_id == node_id:
                return
            placing = NodeAffinitySchedulingStrategy(node_id, soft=False)
            self._actor = _actor_class().options(num_cpus=0, scheduling_strategy=placing).remote()
            self._node_id = node_id
            self._actor.warm_up.options(concurrency_group="in").remote()
        log.info("spare worker started", node_id=node_id)


class Worker:
    """One actor and its pipe. spare: where it takes its actor from, if that has one; None: nowhere."""

    def __init__(self, cluster: Cluster, ask: OpenWorker, pipe: Connection, spare: Spare | None) -> None:
        self._cluster = cluster
        self._spare = None if ask.num_gpus else spare
        self._ask = ask
        self._pipe = pipe
        self._lock = threading.Lock()
        self._actor: Any = None
        self._local_pid: int | None = None
        self._reason: str | None = None
        self._is_closed = threading.Event()

    def start(self) -> None:
        """Run in threads of its own."""
        threading.Thread(target=self._carry_in, name="treadle-ray-in", daemon=True).start()
        threading.Thread(target=self._live, name="treadle-ray-out", daemon=True).start()

    def _carry_in(self) -> None:
        number = 0
        while True:
            try:
                message = self._pipe.recv_bytes()
            except (EOFError, OSError):
                break
            actor = self._actor
            if actor is None:
                continue  # only Stop comes before the actor has spoken, and the end of the pipe behind it
            try:
                actor.put.options(concurrency_group="in").remote(number, message)
            except RayError as error:
                self._reason = f"a message did not reach the Ray actor: {_one_line(error)}"
                break
            number += 1
        self.kill()

    def _live(self) -> None:
        bundle = {kind: n for kind, n in (("CPU", self._ask.num_cpus), ("GPU", self._ask.num_gpus)) if n > 0}
        if (reason := self._cluster.missing(self._ask.name, bundle)) is not None:
            self._tell(LoadFailed(message=reason, is_config=True))
            return self._end(reason)
        group = None
        try:
            group = self._cluster.reserve(self._ask.name, bundle) if bundle else None
            reason = self._serve(group, bundle)
        except RayError as error:
            reason = f"the Ray actor ended: {_cause(error)}"
        except Exception as error:  # noqa: BLE001 (Ray raises whatever it likes; the server must hear of it)
            reason = f"Ray failed: {_one_line(error)}"
        self.kill()
        if group is not None:
            self._cluster.release(self._ask.name, group)
        return self._end(self._reason or reason)

    def _serve(self, group: Any, bundle: Mapping[str, float]) -> str:
        """Start the actor and carry out what it says; the reason of its end. Raises RayError when it dies."""
        if group is not None and not self._is_placed(group, bundle):
            return "the worker was given up before it had a place"
        with self._lock:
            if self._is_closed.is_set():
                return "the worker was given up before it started"
            spare = self._taken_spare(group)
            self._actor = spare or self._make_actor(group)
        beginning = self._actor.begin.options(concurrency_group="in").remote(pickle.dumps(self._ask.config))
        pid, node_id = ray.get(beginning)
        if node_id == self._cluster.node_id:
            self._local_pid = pid
            self._cluster.note_local(pid, is_there=True)
        log.info("worker launched", worker=self._ask.name, pid=pid, node_id=node_id, was_spare=spare is not None)
        self._tell(ActorStarted(pid, node_id, was_spare=spare is not None))
        take = self._actor.take.options(concurrency_group="out")
        is_first = True
        while True:
            messages = ray.get(take.remote())
            if is_first:
                self._prepare_spare(node_id)
                is_first = False
            for message in messages:
                if isinstance(message, int):
                    return f"the worker ended with status {message}"
                self._pipe.send_bytes(message)

    def _is_placed(self, group: Any, bundle: Mapping[str, float]) -> bool:
        """Wait for room; False when nobody wants it any more."""
        said = time.monotonic()
        while not group.wait(timeout_seconds=1):
            if self._is_closed.is_set():
                return False
            if time.monotonic() - said >= _SAY_EVERY_S:
                said = time.monotonic()
                free = _resources(ray.available_resources)
                log.warning("worker waits for room in the cluster", worker=self._ask.name, needs=bundle, free=free)
        return True

    def _taken_spare(self, group: Any) -> Any:
        if self._spare is None or group is None:
            return None
        return self._spare.take(str(placement_group_table(group)["bundles_to_node_id"][0]))

    def _prepare_spare(self, node_id: str) -> None:
        """A little later: the imports take what a worker that was just started needs to catch up."""
        if self._spare is not None:
            timer = threading.Timer(SPARE_AFTER_S, self._spare.prepare, [node_id])
            timer.daemon = True
            timer.start()

    def _make_actor(self, group: Any) -> Any:
        options: dict[str, Any] = {
            "name": f"{self._ask.name}/{os.urandom(4).hex()}",
            "num_cpus": self._ask.num_cpus,
            "num_gpus": self._ask.num_gpus,
        }
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        return _actor_class().options(**options).remote()

    def _tell(self, message: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(message)

    def _end(self, reason: str) -> None:
        self._tell(ActorEnded(reason))
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """End the actor, also one that is stopped. Idempotent."""
        with self._lock:
            self._is_closed.set()
            if self._local_pid is not None:
                # Ray asks the process itself to leave, which a stopped one does not hear.
                _kill(self._local_pid)
                self._cluster.note_local(self._local_pid, is_there=False)
                self._local_pid = None
            if self._actor is not None:
                with contextlib.suppress(Exception):  # the cluster may be gone, and the actor with it
                    ray.kill(self._actor, no_restart=True)


class _WithoutPrefix:
    """Standard error for JSON lines: what Ray writes before a worker's line would break them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        start = text.find("{")
        is_prefixed = start > 0 and text.lstrip("\x1b[0123456789m").startswith("(") and ") " in text[:start]
        self._stream.write(text[start:] if is_prefixed else text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _actor_class() -> Any:
    return ray.remote(**_ACTOR_CLASS)(WorkerActor)


def _resources(read: Callable[[], Any]) -> dict[str, float]:
    """Amounts by kind, as Ray counts them, without the names of nodes and groups."""
    return {kind: amount for kind, amount in read().items() if kind in ("CPU", "GPU")}


def _check_address(address: str) -> None:
    """Raises OSError when nobody listens there: Ray would look for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT_S).close()


def _give_up(place: str) -> None:
    log.error("no Ray cluster", reason=f"that of {place} did not answer for {_CONNECT_TIMEOUT_S:.0f} s")
    leave()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_MAX_REASON_CHARACTERS] or type(error).__name__


def _cause(error: RayError) -> str:
    """What Ray knows, without the actor's names."""
    text = " ".join(str(error).split())
    _, mark, cause = text.partition("The actor is dead because ")
    return (cause if mark else text)[:_MAX_REASON_CHARACTERS]


def _watch_daemons(cluster: Cluster) -> None:
    """Leave when the cluster's own processes, our children, end: nothing can be done with what is left."""
    watched = {}
    for task in Path("/proc/self/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name in ("gcs_server", "raylet"):
                watched[os.pidfd_open(pid)] = name
    with selectors.DefaultSelector() as selector:
        for descriptor in watched:
            selector.register(descriptor, selectors.EVENT_READ)
        (key, _), *_ = selector.select()
    if cluster.is_left:
        return
    log.error("the Ray cluster ended", process=watched[key.fd])
    cluster.kill_local()
    leave()


def leave() -> None:
    """End this process and whatever it has started."""
    sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def receive(control: socket.socket) -> tuple[Any, Connection | None] | None:
    """The next message of the server, with the pipe that came with it; None: the server is gone."""
    data, descriptors, _, _ = socket.recv_fds(control, MAX_CONTROL_BYTES, 1)
    if not data:
        return None
    return pickle.loads(data), Connection(descriptors[0]) if descriptors else None


def main(arguments: Sequence[str]) -> None:
    """Entry point; the control socket's file descriptor is the only argument."""
    # The server reserves stdout for its ready line, and Ray prints workers' lines there.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    control = socket.socket(fileno=int(arguments[0]))
    first = receive(control)
    if first is None:
        return
    config: ClusterConfig = first[0]
    configure_logging(level=config.log_level, style=config.log_format)
    if config.log_format == "json":
        sys.stderr = _WithoutPrefix(sys.stderr)
    try:
        cluster = Cluster(config)
    except Exception as error:  # noqa: BLE001 (Ray raises whatever it likes)
        _refuse_all(
            control, f"the Ray cluster at {config.address or 'this machine'} cannot be used: {_one_line(error)}"
        )
        return
    log.info("Ray cluster ready", address=config.address or "own", resources=_resources(ray.cluster_resources))
    if cluster.is_own:
        threading.Thread(target=_watch_daemons, args=(cluster,), name="treadle-ray-watch", daemon=True).start()
    spare = Spare() if config.keeps_spare else None
    while (received := receive(control)) is not None:
        ask, pipe = received
        assert pipe is not None, "a worker comes with its pipe"
        Worker(cluster, ask, pipe, spare).start()
    cluster.is_left = True
    cluster.kill_local()
    ray.shutdown()


def _refuse_all(control: socket.socket, reason: str) -> None:
    """Say why there are no workers to those who have asked. The next one who asks gets another process."""
    log.error("no Ray cluster", reason=reason)
    control.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while (received := receive(control)) is not None:
            pipe = received[1]
            if pipe is not None:
                pipe.send(ActorEnded(reason))
                pipe.close()


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
