"""What a server and its Ray process say to each other besides a worker's own messages: frozen values, pickled.

The sockets between them are private to the two processes; nothing from the network is ever unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from treadle.executor.messages import WorkerConfig


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The first message. address "": a cluster of this process's own; object_store_bytes 0: Ray chooses.

    name: of this start of the server; placement groups and actors carry it. keeps_spare: whether one actor that has
    imported everything waits beside the workers.
    """

    address: str
    object_store_bytes: int
    name: str
    keeps_spare: bool
    log_level: str
    log_format: Literal["console", "json"]


@dataclass(frozen=True, slots=True)
class OpenWorker:
    """Make a worker; the end of its pipe comes with this message."""

    name: str
    config: WorkerConfig
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, slots=True)
class ActorStarted:
    """The actor runs: on which node, as which process of it."""

    pid: int
    node_id: str
    was_spare: bool


@dataclass(frozen=True, slots=True)
class ActorEnded:
    """The last message of a worker's pipe."""

    reason: str
