"""What the servers of these tests run on: executor, sampler and store, as the environment of the tests says.

Empty means a server's own defaults. `scripts/e2e_matrix` sets the variables:
E2E_EXECUTOR: local or ray. E2E_RAY_ADDRESS: of a running cluster. E2E_SAMPLER: builtin or vllm. E2E_VLLM_PYTHON: the
Python that has vllm. E2E_POSTGRES: URL of a PostgreSQL server's database from which others may be created.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import psycopg

# How long a server may take until it serves.
READY_S = {"vllm": 240.0, "ray": 120.0}
DEFAULT_READY_S = 60.0


def settings_of(data_dir: Path) -> dict[str, str]:
    """Settings, as environment variables, of a server on this data directory; the same at each start of it."""
    settings = {}
    if executor := os.environ.get("E2E_EXECUTOR"):
        settings["TREADLE_EXECUTOR__KIND"] = executor
    if address := os.environ.get("E2E_RAY_ADDRESS"):
        settings["TREADLE_EXECUTOR__RAY_ADDRESS"] = address
        # Many servers at once share the few cores that it has.
        settings |= {"TREADLE_EXECUTOR__NUM_CPUS": "0.01", "TREADLE_EXECUTOR__SAMPLER_NUM_CPUS": "0.01"}
    if sampler := os.environ.get("E2E_SAMPLER"):
        settings["TREADLE_SAMPLER__KIND"] = sampler
    if python := os.environ.get("E2E_VLLM_PYTHON"):
        settings["TREADLE_SAMPLER__VLLM__PYTHON"] = python
    if url := os.environ.get("E2E_POSTGRES"):
        settings["TREADLE_STORE__URL"] = _database(url, data_dir)
    return settings


def ready_s() -> float:
    """Seconds that a server has until its ready line."""
    kinds = (os.environ.get("E2E_SAMPLER", ""), os.environ.get("E2E_EXECUTOR", ""))
    return max(READY_S.get(kind, DEFAULT_READY_S) for kind in kinds)


def _database(url: str, data_dir: Path) -> str:
    """A database of this data directory's own, created at the first call."""
    name = "e2e_" + hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
    head, _, query = url.partition("?")
    return f"{head.rsplit('/', 1)[0]}/{name}" + (f"?{query}" if query else "")
