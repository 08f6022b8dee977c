"""The `tinker` command and the SDK's clients on accounts: keys, tokens, sessions, runs, traces, usage. One server."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tinker
from e2e_support import MODEL, ServerProcess, batch, new_run, train_step
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

PREFIX = "/twinkle"


def create_key(data_dir: Path, user: str) -> str:
    command = [sys.executable, "-m", "treadle.cli", "keys", "create", user, "--data", str(data_dir)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# Runs several commands of the real command line in one process, because its imports take seconds; its clients are
# cached by process, so a process has one set of credentials.
DRIVER = """
import json, sys
from click.testing import CliRunner
from tinker.cli.__main__ import main_cli
from tinker.cli.exceptions import TinkerCliError

answers = []
for args, typed in json.load(sys.stdin):
    done = CliRunner().invoke(main_cli, args, input=typed)
    text, error = done.stdout, done.exception
    if isinstance(error, TinkerCliError):
        text += f"{error.message} {error.details}"
    elif error is not None and not isinstance(error, SystemExit):
        raise error
    answers.append((done.exit_code, text))
json.dump(answers, sys.stdout)
"""


@dataclass
class Account:
    """A user of the server with a home directory of its own, at the command line."""

    url: str
    home: Path
    key: str | None

    def run(self, *commands: str, typed: str = "") -> list[tuple[int, str]]:
        """The exit status of `tinker COMMAND` and what it wrote, for each of these. typed: into the first one."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
        env |= {"HOME": str(self.home), "TINKER_BASE_URL": self.url, "TINKER_TELEMETRY": "0"}
        env |= {} if self.key is None else {"TINKER_API_KEY": self.key}
        asked = [(shlex.split(command), typed if index == 0 else "") for index, command in enumerate(commands)]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            env=env,
            cwd=self.home,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return [(status, text) for status, text in json.loads(done.stdout)]

    def json(self, *commands: str) -> list[Any]:
        """What these commands answer as JSON."""
        answers = self.run(*(f"-f json {command}" for command in commands))
        assert all(status == 0 for status, _ in answers), answers
        return [json.loads(text) for _, text in answers]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With created keys only, below a prefix."""
    process = ServerProcess(tmp_path_factory.mktemp("account"), env={"TREADLE_SERVER__ROOT_PATH": PREFIX})
    process.url += PREFIX
    with process:
        yield process


@pytest.fixture(scope="module")
def ada(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Account:
    return Account(server.url, tmp_path_factory.mktemp("ada"), create_key(server.data_dir, "ada"))


@dataclass(frozen=True)
class Work:
    """What ada did: one session with a run that was trained, saved and sampled."""

    session_id: str
    run_id: str
    num_trained_tokens: int


@pytest.fixture(scope="module")
def work(server: ServerProcess, ada: Account) -> Work:
    assert ada.key is not None
    with tinker.ServiceClient(
        base_url=server.url, api_key=ada.key, project_id="weaving", user_metadata={"team": "red"}
    ) as service:
        client = new_run(service, user_metadata={"purpose": "test"})
        for _ in range(2):
            train_step(client, batch(2, 16))
        client.save_state("one").result(timeout=60)
        sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
        prompt = types.ModelInput.from_ints([10, 11, 12, 13])
        params = types.SamplingParams(max_tokens=5, stop=[])
        sampler.sample(prompt=prompt, num_samples=2, sampling_params=params).result(timeout=60)
        session_id, run_id = client.model_id.partition(":")[0], client.model_id
    return Work(session_id=session_id, run_id=run_id, num_trained_tokens=2 * 2 * 16)


def test_login_status_whoami_and_logout(server: ServerProcess, ada: Account, tmp_path: Path) -> None:
    """With the pasted key stored in the home directory, and no key in the environment."""
    stored = Account(server.url, tmp_path, key=None)

    login, status, whoami, logout, after = stored.run(
        "auth login", "auth status", "-f json auth whoami", "auth logout", "auth status", typed=f"{ada.key}\n"
    )

    assert "Logged in as ada (user:ada)" in login[1]
    assert status == (0, "Credentials available: yes\nTinker accessible: yes\n")
    assert json.loads(whoami[1]) == {
        "user_urn": "tml:user:ada",
        "org_urn": "tml:organization:user:ada",
        "email": None,
    }
    assert "The API key is still active" in logout[1]
    assert after[0] == 1
    assert "Credentials available: no" in after[1]


def test_a_key_that_nobody_has_is_refused(server: ServerProcess, ada: Account, tmp_path: Path) -> None:
    stranger = Account(server.url, tmp_path, key="tml-nobody")

    for status, text in stranger.run("auth login", "run list", typed="tml-nobody\n"):
        assert status == 1
        assert "not known to the server" in text


def test_models_and_runs(ada: Account, work: Work) -> None:
    listed, matching, runs, info = ada.json("model list", "model list TINY", "run list", f"run info {work.run_id}")

    models = {model["model_name"]: model for model in listed["models"]}
    assert models[MODEL] == {"model_name": MODEL, "max_context_length": 2048, "trainable": True, "sampleable": True}
    assert MODEL in {model["model_name"] for model in matching["models"]}
    assert [run["training_run_id"] for run in runs["runs"]] == [work.run_id]
    run = info.get("run", info)
    assert (run["base_model"], run["lora_rank"], run["corrupted"]) == (MODEL, 8, False)
    assert run["user_metadata"] == {"purpose": "test"}
    assert run["last_checkpoint"]["tinker_path"] == f"tinker://{work.run_id}/weights/one"


def test_what_is_not_there_is_said_so(ada: Account, work: Work) -> None:
    # The first asks whoami for the organization's name.
    model, run, trace = ada.run("model list nothing", "run info nothing:train:0", "session export-trace nothing")

    assert [model[0], run[0], trace[0]] == [1, 1, 1]
    assert "tml:organization:user:ada" in model[1]
    assert "not found" in run[1]
    assert "not found" in trace[1]


def test_a_trace_is_exported_and_its_url_needs_no_key(ada: Account, work: Work) -> None:
    (status, _), (_, shown) = ada.run(
        f"session export-trace {work.session_id} --output trace.json",
        f"session export-trace {work.session_id} --url-only",
    )

    assert status == 0
    trace = json.loads((ada.home / "trace.json").read_bytes())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    ran = [event for event in events if event["cat"] == "running"]
    assert [event["name"].split()[0] for event in ran].count("forward_backward") == 2
    assert [event["name"].split()[0] for event in ran].count("optim_step") == 2
    assert all(event["dur"] > 0 for event in ran)
    assert any(event["name"].startswith("sample ") for event in events)
    cycles = {event["name"] for event in events if event["cat"] == f"cycles of {MODEL}"}
    assert cycles == {f"cycle {event['args']['cycle']}" for event in ran}
    url = shown.strip().splitlines()[-1]
    with urllib.request.urlopen(url) as answer:
        assert json.loads(answer.read())["otherData"]["session_id"] == work.session_id
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url[:-2])


def test_usage_and_storage(ada: Account, work: Work) -> None:
    # The hour before as well: it may have turned since the work was done.
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = " ".join((hour + timedelta(hours=offset)).strftime("%Y-%m-%dT%H:%M:%SZ") for offset in (-1, 1))
    usage, storage, elsewhere = ada.json(
        f"billing usage {window}", "billing checkpoint-storage", "billing checkpoint-storage --project-id other"
    )

    totals: dict[tuple[str, bool | None], int] = {}
    for event in usage["data"]:
        assert (event["session_id"], event["base_model"]) == (work.session_id, MODEL)
        assert (event["user_id"], event["user_name"], event["project_id"]) == ("tml:user:ada", "ada", "weaving")
        info = event["event_info"]
        kind = info["type"], info.get("cached")
        totals[kind] = totals.get(kind, 0) + info.get("token_count", info.get("count", 0))
    assert totals["training", None] == work.num_trained_tokens
    assert totals["sampling_sample", None] == 2 * 5
    assert totals["sampling_prefill", False] + totals.get(("sampling_prefill", True), 0) == 4
    assert totals["checkpoint", None] == 1
    assert usage["sessions"][work.session_id]["user_metadata"] == {"team": "red"}
    [row] = storage["data"]
    assert (row["project_id"], row["checkpoint_count"]) == ("weaving", 1)
    assert row["size_bytes"] > 0
    assert elsewhere["data"] == []


def test_sessions_are_searched_moved_and_audited_with_the_sdk(server: ServerProcess, ada: Account, work: Work) -> None:
    rest = server.rest_client(str(ada.key))
    assert rest.list_sessions(access_scope="accessible").result(timeout=60).sessions[0] == work.session_id
    session = rest.get_session(work.session_id).result(timeout=60)
    assert (session.training_run_ids, session.user_metadata) == ([work.run_id], {"team": "red"})
    request = types.SessionSearchRequest(
        project_ids=["weaving"],
        user_metadata={"team": "red"},
        statuses=[types.ClientFinishedSessionStatusQuery(reasons=["success"])],
        limit=1,
    )
    with pytest.warns(tinker.ExperimentalWarning):
        page = rest.search_sessions(request).result(timeout=60)
    [found] = page.sessions
    assert page.next_cursor is None
    assert (found.session_id, found.owner, found.checkpoints_count) == (work.session_id, "tml:user:ada", 1)
    assert isinstance(found.status, types.ClientSessionFinished)
    assert found.status.reason.type == "success"

    rest.assign_session_project(work.session_id, "dyeing").result(timeout=60)

    runs = rest.list_training_runs(project_id="dyeing").result(timeout=60).training_runs
    assert [run.training_run_id for run in runs] == [work.run_id]
    admin = tinker.AdminClient(base_url=server.url, api_key=ada.key)
    entries = admin.get_audit_log("projects").result(timeout=60).entries
    assert [(entry.event, entry.event_details["project_id"]) for entry in entries] == [
        ("project_session_assigned", "dyeing")
    ]
    with pytest.raises(tinker.NotFoundError):
        rest.assign_session_project("nothing", "dyeing").result(timeout=60)
    # So that other tests find the work where it was done.
    rest.assign_session_project(work.session_id, "weaving").result(timeout=60)


def test_a_revoked_key_ends_the_clients_that_hold_its_tokens(server: ServerProcess, ada: Account) -> None:
    key = create_key(server.data_dir, "bob")
    rest = server.rest_client(key)
    assert rest.whoami().result(timeout=60).user_urn == "tml:user:bob"
    assert rest.list_training_runs().result(timeout=60).training_runs == []

    with server.http(key) as http:
        assert http.delete("auth/apikey/me").status_code == 200

    with pytest.raises(tinker.AuthenticationError, match="not known"):
        rest.list_training_runs().result(timeout=60)
