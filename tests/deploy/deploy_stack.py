"""compose.yaml without containers: each service's own command, with ports, host names and paths of this machine.

Ray's nodes and the server find each other by looking at the processes of the machine and at /tmp/ray, so each gets both
for itself, as in a container, where that is allowed (`can_contain`). What an image would do around a command
(PostgreSQL's initdb, users, volumes) is done here; MinIO's server is used where it is installed, and moto's S3 server
where it is not. Invariant: `Stack` ends every process that it started, and what those started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from deploy_files import ROOT, command_of, services

from treadle.testing.postgres import find_programs

START_S = 180.0
STOP_S = 60.0
# Those that are told apart by processes and files of the machine.
CONTAINED = ("ray-head", "ray-worker", "gateway")
_CONTAIN = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--kill-child"]
_OWN_RAY_DIR = 'mount -t tmpfs none /tmp/ray && exec "$@"'
BIN = ROOT / "docker/bin"
OWN_BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def can_contain() -> bool:
    """Whether namespaces of processes and mounts can be made here: by root, on Linux."""
    if shutil.which("unshare") is None:
        return False
    Path("/tmp/ray").mkdir(exist_ok=True)
    command = [*_CONTAIN, "sh", "-c", _OWN_RAY_DIR, "sh", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Stack:
    """The services, started and stopped by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Another user's database reads its password here, which no parent may hide.
        self.postgres_dir = Path(tempfile.mkdtemp(prefix="treadle-compose-", dir="/tmp"))
        ports = {name: free_port() for name in ("gateway", "postgres", "minio", "head", "node")}
        self.url = f"http://127.0.0.1:{ports['gateway']}"
        self.ports = ports
        self._here = {
            "postgres:5432": f"127.0.0.1:{ports['postgres']}",
            "minio:9000": f"127.0.0.1:{ports['minio']}",
            "--address=:9000": f"--address=127.0.0.1:{ports['minio']}",
            "ray-head:6379": f"127.0.0.1:{ports['head']}",
            "--port=6379": f"--port={ports['head']}",
            "127.0.0.1:6379": f"127.0.0.1:{ports['head']}",
            "--node-manager-port=6380": f"--node-manager-port={ports['node']}",
            "127.0.0.1:6380": f"127.0.0.1:{ports['node']}",
            "127.0.0.1:8000": f"127.0.0.1:{ports['gateway']}",
            "port = 8000": f"port = {ports['gateway']}",
            "/etc/treadle/": f"{folder}/etc/",
            "/run/treadle/": f"{folder}/run/",
            "/var/lib/treadle": f"{folder}/data",
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._is_contained = can_contain()
        for name in ("etc", "run/postgres", "run/s3", "run/ray", "run/keys", "run/metrics"):
            (folder / name).mkdir(parents=True)
        (folder / "etc/treadle.toml").write_text(self.here((ROOT / "docker/treadle.toml").read_text()))

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for name in reversed(list(self._processes)):
            self.kill(name)
        shutil.rmtree(self.postgres_dir, ignore_errors=True)

    def here(self, text: str) -> str:
        """A text of compose.yaml or of the configuration with this machine's places in it."""
        for there, here in self._here.items():
            text = text.replace(there, here)
        return text

    def command(self, name: str) -> list[str]:
        return [self.here(word) for word in command_of(name)]

    def environment(self, name: str) -> dict[str, str]:
        mine = {key: value for key, value in os.environ.items() if not key.startswith(("TREADLE_", "AWS_", "RAY_"))}
        theirs = {
            key: self.here("" if value is None else str(value))
            for key, value in services()[name].get("environment", {}).items()
        }
        path = f"{BIN}:{OWN_BIN}:{find_programs()}:{mine['PATH']}"
        return {**mine, **theirs, "PATH": path, "NO_PROXY": "*", "PGPORT": str(self.ports["postgres"])}

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """A one-shot service, to its end."""
        command = self.command(name)
        return subprocess.run(
            command,
            env=self.environment(name),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(self, name: str) -> None:
        """A service that stays; returns when its own health check passes."""
        command, user = self.command(name), {}
        if name == "postgres":
            command, user = self._postgres(command)
        elif name == "minio":
            command = self._minio(command)
        elif name in CONTAINED and self._is_contained:
            command = [*_CONTAIN, "sh", "-c", _OWN_RAY_DIR, "sh", *command]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env=self.environment(name), cwd=self.postgres_dir if user else self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **user,
            )  # fmt: skip
        self.wait_healthy(name)

    def wait_healthy(self, name: str) -> None:
        """Return when the service's own health check passes. Fails when its process ends."""
        test = services()[name]["healthcheck"]["test"]
        if name == "minio" and self._is_moto:
            test = ["CMD", "treadle-probe", f"tcp://127.0.0.1:{self.ports['minio']}"]
        command = [self.here(word) for word in test[1:]]
        give_up_at = time.monotonic() + START_S
        while True:
            done = subprocess.run(command, env=self.environment(name), capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            status = self._processes[name].poll()
            assert status is None, f"{name} ended with {status}:\n{self.log(name)[-3000:]}"
            assert time.monotonic() < give_up_at, f"{name} is not well: {done.stderr}\n{self.log(name)[-3000:]}"
            time.sleep(0.3)

    def terminate(self, name: str) -> int:
        """What `docker compose stop` does; the exit status."""
        process = self._processes[name]
        family = _family(process.pid)
        # The first process of a container, which `unshare` only waits for.
        top = psutil.Process(process.pid)
        (top.children()[0] if top.name() == "unshare" else top).send_signal(signal.SIGTERM)
        status = process.wait(STOP_S)
        _end(family)
        del self._processes[name]
        return status

    def kill(self, name: str) -> None:
        """What `docker kill` does: everything in the container at once. Idempotent."""
        process = self._processes.pop(name, None)
        if process is not None:
            _end(_family(process.pid))
            process.wait()

    @property
    def _is_moto(self) -> bool:
        return shutil.which("minio") is None

    def _minio(self, command: list[str]) -> list[str]:
        if self._is_moto:
            return ["moto_server", "-H", "127.0.0.1", "-p", str(self.ports["minio"])]
        return ["minio", *[word.replace("/data", f"{self.folder}/minio") for word in command]]

    def _postgres(self, command: list[str]) -> tuple[list[str], dict[str, Any]]:
        """The command with a data directory, made as the image makes it, and the user that may run it."""
        data, password = self.postgres_dir / "data", self.postgres_dir / "password"
        user: dict[str, Any] = (
            {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        )
        environment = self.environment("postgres")
        if not data.exists():
            shutil.copy(environment["POSTGRES_PASSWORD_FILE"], password)
            for path in (self.postgres_dir, password):
                if user:
                    shutil.chown(path, "postgres", "postgres")
            name = environment["POSTGRES_USER"]
            setup = [
                "initdb",
                f"--username={name}",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--no-sync",
                "-D",
                data,
            ]
            subprocess.run(setup, env=environment, cwd=self.postgres_dir, check=True, capture_output=True, **user)
            alone = f"CREATE DATABASE {environment['POSTGRES_DB']};\n"
            single = ["postgres", "--single", "-D", str(data), "postgres"]
            subprocess.run(
                single,
                env=environment,
                cwd=self.postgres_dir,
                input=alone.encode(),
                check=True,
                capture_output=True,
                **user,
            )
        places = {
            "port": self.ports["postgres"],
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.postgres_dir,
        }
        return [*command, "-D", str(data), *[f"--{name}={value}" for name, value in places.items()]], user


def _family(pid: int) -> list[psutil.Process]:
    """A process and everything below it, which Ray's processes are as long as it lives."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def _end(family: list[psutil.Process]) -> None:
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=STOP_S)
