"""An executor whose sampler is a vLLM in processes of its own, in this environment or another one.

It samples only. Requests that vLLM is not for come back as needs_builtin, at once. vLLM's own HTTP server is never
started, and its processes get none of the server's settings, which may hold secrets.
Invariant: when the executor has stopped or died, no process and no file of that vLLM is left.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import treadle
from treadle.config import environment_for_child
from treadle.domain.limits import HANG_AFTER_S
from treadle.domain.roles import Role
from treadle.errors import ConfigError
from treadle.executor.base import PartsCallback
from treadle.executor.channel import SamplingChannel
from treadle.executor.messages import WorkerConfig
from treadle.executor.spare import start_process
from treadle.executor.vllm_messages import StartVllm
from treadle.executor.vllm_processes import VllmTransport
from treadle.sampler.vllm_options import VllmOptions
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


class VllmExecutor(SamplingChannel):
    """One vLLM. `start` may be called once; after a death make a new executor.

    python: of the environment that has vllm and this treadle; None: the server's own.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        options: VllmOptions | None = None,
        python: Path | None = None,
        role: Role = Role.SAMPLING,
        name: str = "",
        hang_after_s: float = HANG_AFTER_S,
        on_parts: PartsCallback | None = None,
    ) -> None:
        assert role is Role.SAMPLING, "vLLM does not train"
        super().__init__(role=role, name=name or config.base_model, hang_after_s=hang_after_s, on_parts=on_parts)
        self._config = config
        self._options = options or VllmOptions()
        self._python = python

    @property
    def pid(self) -> int | None:
        """The child's process id, once started."""
        return None if self._transport is None else self._child.process.pid

    @property
    def directory(self) -> Path | None:
        """Of its files, once started; it is removed behind the last of its processes."""
        return None if self._transport is None else Path(self._child.directory)

    @property
    def _child(self) -> VllmTransport:
        assert isinstance(self._transport, VllmTransport)
        return self._transport

    def _open(self) -> VllmTransport:
        command = [str(self._python or sys.executable), "-m", "treadle.executor.vllm_child"]
        directory = tempfile.mkdtemp(prefix="treadle-vllm-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)
        try:
            child = start_process(command, environment=_environment(self._config, directory))
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise ConfigError(f"sampler.vllm.python, {command[0]}, cannot be run: {error.strerror}") from error
        log.info("vLLM launched", worker=self.name, pid=child.process.pid)
        # One that died a moment ago is found out by the receiving side.
        with contextlib.suppress(OSError):
            child.connection.send(StartVllm(treadle.__version__, self._config, self._options, directory))
        return VllmTransport(child, directory)


def _environment(config: WorkerConfig, directory: str) -> Mapping[str, str]:
    """This process's environment as vLLM needs it, without treadle's settings."""
    inherited = environment_for_child()
    settings = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "INFO" if config.log_level == "debug" else "WARNING",
        # A fork would share the server's pipe.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # Its sockets.
        "VLLM_RPC_BASE_PATH": directory,
        # Nothing is tokenized there.
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.num_threads:
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(config.num_threads)}
    kind, _, number = config.device.partition(":")
    if kind == "cuda" and number:
        settings[_VISIBLE_DEVICES] = _visible_device(inherited.get(_VISIBLE_DEVICES), int(number))
    return {**inherited, **settings}


def _visible_device(visible: str | None, number: int) -> str:
    """What this process calls cuda:N, for one that is to see it alone."""
    if visible is None:
        return str(number)
    devices = [device.strip() for device in visible.split(",") if device.strip()]
    if number >= len(devices):
        raise ConfigError(f"engine.device is cuda:{number}; {_VISIBLE_DEVICES} shows {len(devices)} devices")
    return devices[number]
