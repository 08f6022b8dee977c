"""A real server among strangers: no credential is anywhere it must not be, and hostile connections hold up nobody."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_support import MODEL, ServerProcess, batch, failure_of, new_run, train_step
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

ORGANIZATION = "explorers"
MEMBER_TOKEN = "ms-3c9e1f70-aaaa-bbbb-cccc-0123456789ab"
STRANGER_TOKEN = "ms-77777777-dddd-eeee-ffff-0123456789ab"
# Nobody's, and each sent to one place only, so that a leak names it.
WRONG = {
    place: f"tml-{place}-5Yq0m3Jt8Vb2Xc7Zn4Kd9Lw1Hs6Rf"
    for place in ("header", "bearer", "query", "path", "body", "cookie")
}
NAMES = {MEMBER_TOKEN: "grace", STRANGER_TOKEN: "mallory"}


class ModelScope(BaseHTTPRequestHandler):
    """The two calls that the server makes."""

    def do_POST(self) -> None:
        token = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["AccessToken"]
        name = NAMES.get(token)
        self._answer(
            {"Code": 200, "Success": True, "Data": {"Username": name}} if name else {"Code": 400, "Success": False}
        )

    def do_GET(self) -> None:
        self._answer({"Code": 200, "Success": True, "Data": {"IsMember": self.path.endswith("/grace")}})

    def _answer(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing to standard error."""


@pytest.fixture(scope="module")
def modelscope() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ModelScope) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@dataclass
class Watched:
    """A server whose every word is kept, and every credential that anybody sent it."""

    server: ServerProcess
    lines: list[str] = field(default_factory=list)
    credentials: dict[str, str] = field(default_factory=dict)
    # What the server said to clients, by what it was about.
    answers: list[tuple[str, str]] = field(default_factory=list)

    def create_key(self, user: str, *options: str) -> str:
        command = [sys.executable, "-m", "treadle.cli", "keys", "create", user, "--data", str(self.server.data_dir)]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        key = done.stdout.strip().splitlines()[-1].strip()
        assert key.startswith("tml-")
        self.credentials[f"key of {user}"] = key
        return key

    def ask(self, what: str, method: str, path: str, **options: Any) -> httpx.Response:
        answer = httpx.request(method, self.server.url + path, timeout=60, **options)
        self.answers.append((what, answer.text + str(answer.headers)))
        return answer


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, modelscope: str) -> Iterator[Watched]:
    lines: list[str] = []
    env = {
        "TREADLE_LOG__LEVEL": "debug",
        "TREADLE_LOG__FORMAT": "json",
        "TREADLE_AUTH__METHODS": '["keys", "modelscope"]',
        "TREADLE_AUTH__MODELSCOPE__ORGANIZATION": ORGANIZATION,
        "TREADLE_AUTH__MODELSCOPE__ENDPOINT": modelscope,
        "TREADLE_SERVER__HEADER_TIMEOUT_S": "2",
        "TREADLE_SERVER__MAX_CONNECTIONS_PER_ADDRESS": "100",
    }
    with ServerProcess(tmp_path_factory.mktemp("data") / "data", env=env, on_log=lines.append) as server:
        watched = Watched(server, lines)
        watched.credentials |= {"member's token": MEMBER_TOKEN, "stranger's token": STRANGER_TOKEN}
        watched.credentials |= {f"key in the {place}": key for place, key in WRONG.items()}
        yield watched


def processes_of(pid: int) -> dict[str, bytes]:
    """Arguments and environment of a process and all that came from it."""
    found = {}
    for file in ("cmdline", "environ"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            found[f"{pid}/{file}"] = Path(f"/proc/{pid}/{file}").read_bytes()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            for child in (task / "children").read_text().split():
                found |= processes_of(int(child))
    return found


def everything_kept(watched: Watched) -> dict[str, bytes]:
    """All that the server wrote anywhere, by where."""
    assert watched.server.process is not None
    found = {"the log": "\n".join(watched.lines).encode()}
    for path in watched.server.data_dir.rglob("*"):
        if path.is_file():
            found[str(path)] = path.read_bytes()
    found |= processes_of(watched.server.process.pid)
    found["metrics"] = httpx.get(f"{watched.server.url}/metrics").content
    return found | {f"answer about {what} {index}": text.encode() for index, (what, text) in enumerate(watched.answers)}


def forms_of(secret: str) -> list[bytes]:
    """A credential as it may be written."""
    plain = secret.encode()
    bare = secret.removeprefix("tml-").removeprefix("ms-").encode()
    return [plain, bare, urllib.parse.quote(plain, safe="").encode(), base64.b64encode(plain), plain.hex().encode()]


def use_everything(watched: Watched, key: str) -> None:
    """One client's work: training, checkpoints, samples, tokens, traces, downloads."""
    server = watched.server
    service = server.service(key)
    run = new_run(service)
    train_step(run, batch())
    saved = run.save_state("kept").result(timeout=60)
    sampling = run.save_weights_and_get_sampling_client().result(timeout=60)
    sampling.sample(types.ModelInput.from_ints([5, 6, 7]), 1, types.SamplingParams(max_tokens=4)).result(timeout=60)
    rest = server.rest_client(key)
    rest.list_training_runs().result(timeout=60)
    headers = {"X-API-Key": key}
    token = watched.ask("a login", "POST", "/api/v1/auth/token", headers=headers).json()["jwt"]
    # The answer is the one place that has it.
    watched.answers.pop()
    watched.credentials[f"token of {key[:8]}"] = token
    assert watched.ask("a token", "GET", "/api/v1/sessions", headers={"X-API-Key": token}).status_code == 200
    session_id = saved.path.removeprefix("tinker://").partition(":")[0]
    export = watched.ask("a trace", "GET", f"/api/v1/sessions/{session_id}/trace_export", headers=headers)
    assert export.status_code == 200, export.text
    watched.ask(
        "text", "POST", "/v1/completions", headers=headers, json={"model": MODEL, "prompt": "a", "max_tokens": 2}
    )
    watched.ask("usage", "GET", "/api/v1/audit", headers=headers)


def misuse_everything(watched: Watched, key: str) -> None:
    """Credentials that are wrong, or where none belong."""
    ask, good = watched.ask, {"X-API-Key": key}
    assert ask("a wrong key", "GET", "/api/v1/sessions", headers={"X-API-Key": WRONG["header"]}).status_code == 401
    assert (
        ask("a wrong bearer", "GET", "/v1/models", headers={"Authorization": f"Bearer {WRONG['bearer']}"}).status_code
        == 401
    )
    for name, value in (
        ("Authorization", f"Basic {base64.b64encode(WRONG['bearer'].encode()).decode()}"),
        ("X-API-Key", WRONG["header"] + "="),
        ("X-API-Key", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0."),
        ("X-API-Key", next(v for k, v in watched.credentials.items() if k.startswith("token of"))[:-8] + "AAAAAAAA"),
        ("Cookie", f"key={WRONG['cookie']}"),
    ):
        assert ask("a bad credential", "GET", "/api/v1/sessions", headers={name: value}).status_code == 401
    for path in (f"/api/v1/{WRONG['path']}", f"/api/v1/sessions/{WRONG['path']}", f"/{WRONG['path']}/x"):
        assert ask("a key in the path", "GET", path, headers=good).status_code == 404
    query = {"api_key": WRONG["query"], "limit": WRONG["query"]}
    ask("a key in the query", "GET", "/api/v1/training_runs", headers=good, params=query)
    session = ask("a session", "POST", "/api/v1/create_session", headers=good, json={}).json()["session_id"]
    bodies: list[tuple[str, dict[str, object]]] = [
        (
            "create_model",
            {"session_id": session, "model_seq_id": 0, "base_model": WRONG["body"], "lora_config": {"rank": 8}},
        ),
        (
            "create_model",
            {"session_id": WRONG["body"], "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 8}},
        ),
        ("weights_info", {"tinker_path": f"tinker://{WRONG['body']}/weights/a"}),
        ("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 1, "model_path": WRONG["body"]}),
        ("retrieve_future", {"request_id": WRONG["body"]}),
        ("optim_step", {"model_id": WRONG["body"], "seq_id": WRONG["body"]}),
    ]
    for path, body in bodies:
        answer = ask("a key in the body", "POST", f"/api/v1/{path}", headers=good, json=body)
        if answer.status_code == 200:
            request_id = answer.json()["request_id"]
            ask("its future", "POST", "/api/v1/retrieve_future", headers=good, json={"request_id": request_id})
    ask("no json", "POST", "/api/v1/create_model", headers=good, content=f'{{"a": {WRONG["body"]}'.encode())
    ask("a text", "POST", "/v1/completions", headers=good, json={"model": WRONG["body"], "prompt": "a"})
    ask(
        "another text",
        "POST",
        "/v1/messages",
        headers=good,
        json={"model": WRONG["body"], "messages": [], "max_tokens": 1},
    )


def test_no_credential_is_kept_or_said_anywhere(watched: Watched) -> None:
    key = watched.create_key("ada")
    admin = watched.create_key("root", "--admin")
    use_everything(watched, key)
    use_everything(watched, f"tml-{MEMBER_TOKEN}")
    for token in (STRANGER_TOKEN, "ms-00000000-0000-0000-0000-000000000000"):
        answer = watched.ask("a stranger", "GET", "/api/v1/sessions", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code in (401, 403), answer.text
    misuse_everything(watched, key)
    made = watched.ask(
        "a new key", "POST", "/admin/v1/keys", headers={"X-API-Key": admin}, json={"user": "bob", "expires_in_s": 3_600}
    ).json()
    # The answer is the one place that has it.
    watched.answers.pop()
    watched.credentials["bob's key"] = made["key"]
    new = {"X-API-Key": made["key"]}
    assert watched.ask("bob", "GET", "/api/v1/sessions", headers=new).status_code == 200
    for path in ("/admin/v1/keys", "/admin/v1/audit", "/admin/v1/tenants", "/admin/v1/usage"):
        watched.ask("operators", "GET", path, headers={"X-API-Key": admin})
    watched.ask("a revocation", "DELETE", f"/admin/v1/keys/{made['key_id']}", headers={"X-API-Key": admin})
    run = new_run(watched.server.service(key))
    bad = batch()
    bad[0].loss_fn_inputs["weights"] = types.TensorData(data=[float("nan")] * 16, dtype="float32", shape=[16])
    assert failure_of(run.forward_backward(bad, "cross_entropy")) is not None

    kept = everything_kept(watched)
    assert any(name.endswith("treadle.db-wal") for name in kept)
    assert sum(name.endswith("/environ") for name in kept) >= 2, "the worker's too"
    assert len([line for line in watched.lines if '"level": "debug"' in line]) > 10
    leaks = [
        (name, where)
        for where, content in kept.items()
        for name, secret in watched.credentials.items()
        if any(form in content for form in forms_of(secret))
    ]
    assert leaks == []
    assert not [where for where, content in kept.items() if b"Traceback" in content and "answer" in where]


def hold(server: ServerProcess, data: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    client.sendall(data)
    return client


def ending(client: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65_536):
            received += data
    client.close()
    return received


def test_hostile_connections_hold_up_nobody(watched: Watched) -> None:
    """A client trains beside slow heads, bodies without a key, heads without an end and too many connections."""
    server = watched.server
    run = new_run(server.service(watched.create_key("eve")))
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status")

    def memory_kb() -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1])

    before_kb = memory_kb()
    head = b"POST /api/v1/forward_backward HTTP/1.1\r\nhost: x\r\n"
    slow = [hold(server, head[: 5 + index]) for index in range(40)]
    endless = [hold(server, head + b"a: " + b"b" * 200_000) for _ in range(5)]
    keyless = [hold(server, head + b"content-length: 60000000\r\n\r\n") for _ in range(5)]
    for client in keyless:
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                client.sendall(bytes(2**20))
    losses = [train_step(run, batch()) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert all(b" 431 " in ending(client) for client in endless)
    # An answer long before the body, unless the reset of the rest overtook it.
    assert all(answer == b"" or b" 401 " in answer for answer in map(ending, keyless))
    assert all(b" 408 " in ending(client) for client in slow)
    assert memory_kb() - before_kb < 200_000

    crowd = []
    refused = b""
    # What the SDK has open counts as well.
    for _ in range(110):
        client = hold(server, b"")
        crowd.append(client)
    for client in crowd[-5:]:
        refused += ending(client)
    assert b" 429 " in refused
    losses.append(train_step(run, batch()))
    assert losses[-1] < losses[0]
    for client in crowd:
        client.close()
    deadline = time.monotonic() + 60
    while True:  # the server sees the ends a moment later
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/healthz").status_code == 200:
                break
        assert time.monotonic() < deadline
    counted = httpx.get(f"{server.url}/metrics").text
    for reason in ("slow_head", "large_head", "connections_of_address"):
        assert f'treadle_refused_connections_total{{reason="{reason}"}}' in counted
    assert os.path.exists(status)
