"""The official `tinker checkpoint` commands and the SDK's checkpoint calls against a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyrage
import pytest
import safetensors.numpy
import tinker
import torch
import transformers
from e2e_support import MODEL, ServerProcess, batch, logprobs_of, new_key, new_run, train_step
from tinker import types

from treadle.config import bundled_model_dir

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning", "ignore::FutureWarning")

COMMAND_S = 100.0
DATA = batch(2, 12)
ONE_HOUR_S = 3_600


@pytest.fixture(scope="module")
def key() -> str:
    return new_key()


@pytest.fixture(scope="module")
def training(server: ServerProcess, key: str) -> tinker.TrainingClient:
    """A run whose weights are not those that it began with."""
    client = new_run(server.service(key))
    train_step(client, DATA, lr=1e-2)
    return client


@pytest.fixture(scope="module")
def logprobs(training: tinker.TrainingClient) -> list[list[float]]:
    """What the run says of DATA."""
    return logprobs_of(training.forward(DATA, "cross_entropy").result(timeout=60))


class Cli:
    """`tinker` as a person runs it: a process, with its key in the environment."""

    def __init__(self, server: ServerProcess, key: str, folder: Path) -> None:
        self._folder = folder
        self._env = {
            **os.environ,
            "TINKER_BASE_URL": server.url,
            "TINKER_API_KEY": key,
            "HOME": str(folder),
            "NO_PROXY": "*",
            "no_proxy": "*",
        }

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`tinker ARGS`, however it ends but for the abort that its transport may make while Python leaves."""
        done = self._run_once(args, env)
        return self._run_once(args, env) if done.returncode == -signal.SIGABRT else done

    def _run_once(self, args: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tinker.cli", *args],
            env={**self._env, **env},
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )

    def json(self, *args: str) -> Any:
        """What `tinker -f json ARGS` prints; it must succeed."""
        done = self.run("-f", "json", *args)
        assert done.returncode == 0, (args, done.stdout, done.stderr)
        return json.loads(done.stdout) if done.stdout.strip() else None

    def checkpoint(self, *args: str) -> Any:
        return self.json("checkpoint", *args)


@pytest.fixture
def cli(server: ServerProcess, key: str, tmp_path: Path) -> Cli:
    return Cli(server, key, tmp_path)


def saved(training: tinker.TrainingClient, name: str) -> str:
    return training.save_state(name).result(timeout=60).path


def exported(training: tinker.TrainingClient, name: str, **options: Any) -> str:
    return training.save_weights_external(name, **options).result(timeout=60).path


def peft_logprobs(adapter: Path) -> list[list[float]]:
    """What transformers and peft say of DATA with the adapter in this directory."""
    base = transformers.AutoModelForCausalLM.from_pretrained(bundled_model_dir(), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter)
    found = []
    for datum in DATA:
        tokens = torch.tensor([datum.model_input.to_ints()])
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].tolist())
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0]
        found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist())
    return found


def test_list_and_info_show_what_was_saved(cli: Cli, training: tinker.TrainingClient) -> None:
    paths = [
        saved(training, "listed"),
        training.save_weights_for_sampler("listed").result(timeout=60).path,
        exported(training, "listed"),
    ]
    run_id = paths[0].removeprefix("tinker://").partition("/")[0]
    for listing in (cli.checkpoint("list", "--run-id", run_id), cli.checkpoint("list", "--limit", "0")):
        found = {one["tinker_path"]: one for one in listing["checkpoints"]}
        assert set(paths) <= found.keys()
        assert [found[path]["checkpoint_type"] for path in paths] == ["training", "sampler", "external"]
    info = cli.checkpoint("info", paths[2])
    assert info["checkpoint_id"] == "external_weights/listed"
    assert info["size_bytes"] > 0
    assert cli.run("checkpoint", "info", paths[2].replace("listed", "nothing")).returncode != 0


def test_publish_lets_others_read(cli: Cli, training: tinker.TrainingClient, server: ServerProcess) -> None:
    path = saved(training, "public")
    stranger = server.rest_client(new_key())
    with pytest.raises(tinker.NotFoundError):
        stranger.get_weights_info_by_tinker_path(path).result(timeout=60)
    for _ in range(2):
        cli.checkpoint("publish", path)
    assert cli.checkpoint("info", path)["public"] is True
    assert stranger.get_weights_info_by_tinker_path(path).result(timeout=60).base_model == MODEL
    assert stranger.list_user_checkpoints().result(timeout=60).checkpoints == []
    for _ in range(2):
        cli.checkpoint("unpublish", path)
    with pytest.raises(tinker.NotFoundError):
        stranger.get_weights_info_by_tinker_path(path).result(timeout=60)


def test_set_ttl_and_remove_it(cli: Cli, training: tinker.TrainingClient) -> None:
    path = saved(training, "dying")
    cli.checkpoint("set-ttl", path, "--ttl", "7200")
    assert cli.checkpoint("info", path)["expires_at"] is not None
    cli.checkpoint("set-ttl", path, "--remove")
    assert cli.checkpoint("info", path)["expires_at"] is None
    refused = cli.run("checkpoint", "set-ttl", path, "--ttl", "60")
    assert refused.returncode != 0
    assert "ttl_seconds" in refused.stdout + refused.stderr


def test_delete_by_path_and_by_run(cli: Cli, server: ServerProcess, key: str) -> None:
    run = new_run(server.service(key))
    paths = [saved(run, name) for name in ("a", "b", "c")]
    sampler = run.save_weights_for_sampler("a").result(timeout=60).path
    run_id = run.model_id
    gone = cli.checkpoint("delete", "--yes", paths[0], paths[1].replace("/b", "/nothing"))
    assert (gone["deleted_count"], [one["tinker_path"] for one in gone["failed"]]) == (
        1,
        [paths[1].replace("/b", "/nothing")],
    )
    assert cli.checkpoint("delete", "--yes", "--run-id", run_id, "--type", "weights")["deleted_count"] == 2
    assert cli.checkpoint("delete", "--yes", "--run-id", run_id)["deleted_count"] == 1
    listing = cli.run("-f", "json", "checkpoint", "list", "--run-id", run_id)
    assert not any(path in listing.stdout for path in (*paths, sampler))
    train_step(run, DATA)


def test_download_of_a_training_checkpoint_is_its_adapter(
    cli: Cli,
    training: tinker.TrainingClient,
    logprobs: list[list[float]],
    tmp_path: Path,
    server: ServerProcess,
    key: str,
) -> None:
    path = saved(training, "download")
    before = {one["tinker_path"] for one in cli.checkpoint("list", "--limit", "0")["checkpoints"]}
    cli.checkpoint("download", path, "--output", str(tmp_path / "out"))
    (directory,) = (tmp_path / "out").iterdir()
    assert {file.name for file in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    np.testing.assert_allclose(peft_logprobs(directory), logprobs, atol=1e-4)
    # Bit for bit what the run itself exports, although it went through a checkpoint and another run.
    own = files_at(server.rest_client(key), exported(training, "compare"))
    assert (directory / "adapter_model.safetensors").read_bytes() == own["adapter_model.safetensors"]
    after = {one["tinker_path"] for one in cli.checkpoint("list", "--limit", "0")["checkpoints"]}
    assert after - before == {path.replace("/weights/download", "/external_weights/compare")}, "nothing is left behind"


def test_download_of_external_weights(
    cli: Cli, training: tinker.TrainingClient, logprobs: list[list[float]], tmp_path: Path
) -> None:
    path = exported(training, "external", ttl_seconds=ONE_HOUR_S)
    cli.checkpoint("download", path, "--output", str(tmp_path / "out"))
    (directory,) = (tmp_path / "out").iterdir()
    np.testing.assert_allclose(peft_logprobs(directory), logprobs, atol=1e-4)


def test_encrypted_weights_are_downloaded_and_decrypted(
    cli: Cli, training: tinker.TrainingClient, server: ServerProcess, key: str, tmp_path: Path
) -> None:
    identity = pyrage.x25519.Identity.generate()
    path = exported(training, "encrypted", age_encryption_recipients=[str(identity.to_public())])
    cli.checkpoint("download", path, "--output", str(tmp_path / "out"))
    (directory,) = (tmp_path / "out").iterdir()
    assert {file.name for file in directory.iterdir()} == {"adapter_config.json.age", "adapter_model.safetensors.age"}
    plain = files_at(server.rest_client(key), exported(training, "not-encrypted"))
    for name, data in plain.items():
        assert pyrage.decrypt((directory / f"{name}.age").read_bytes(), [identity]) == data


def files_at(rest: tinker.RestClient, path: str) -> dict[str, bytes]:
    """The files of external weights, fetched without a key."""
    urls = rest.get_external_weights_urls(path).result(timeout=60).urls
    files = {}
    for name, url in urls.items():
        with urllib.request.urlopen(url, timeout=60) as answer:
            files[name] = answer.read()
    return files


def test_a_url_that_was_changed_serves_nothing(
    training: tinker.TrainingClient, server: ServerProcess, key: str
) -> None:
    path = exported(training, "signed")
    url = server.rest_client(key).get_external_weights_urls(path).result(timeout=60).urls["adapter_config.json"]
    # A letter of the signature.
    other = "B" if url[-30] == "A" else "A"
    for wrong in (url.replace("config.json", "model.safetensors"), url[:-30] + other + url[-29:]):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(wrong, timeout=60)
        assert refused.value.code == 403


class _Hub(BaseHTTPRequestHandler):
    """As much of a model hub as says who is there and then refuses."""

    def do_GET(self) -> None:
        if "whoami" not in self.path:
            self._answer(404, {"error": "there is nothing here"})
            return
        self._answer(200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        self.server.asked.append((self.path, self.rfile.read(length)))  # type: ignore[attr-defined]
        self._answer(403, {"error": "this hub takes nothing"})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def hub() -> Iterator[ThreadingHTTPServer]:
    """A hub on a loopback port; `asked` holds what was posted to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_push_hf_comes_as_far_as_the_hub(cli: Cli, training: tinker.TrainingClient) -> None:
    path = saved(training, "push")
    with hub() as stub:
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{stub.server_port}", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
        done = cli.run("checkpoint", "push-hf", path, **env)
        assert done.returncode != 0
        # A repository is asked for behind the download and the check of its files.
        ((where, body),) = stub.asked  # type: ignore[attr-defined]
    assert where == "/api/repos/create"
    assert f"tinker-{MODEL.partition('/')[2]}" in json.loads(body)["name"]
    assert "403" in done.stdout + done.stderr


def test_a_copy_is_loaded_when_its_source_is_gone(
    training: tinker.TrainingClient, logprobs: list[list[float]], server: ServerProcess, key: str
) -> None:
    path = saved(training, "source")
    other_key = new_key()
    stranger = server.rest_client(other_key)
    with pytest.raises(tinker.NotFoundError):
        stranger.copy_weights(path, "archive").result(timeout=60)
    copy = stranger.copy_weights(path, "archive", weights_access_token=key, ttl_seconds=ONE_HOUR_S).result(timeout=60)
    server.rest_client(key).delete_checkpoint_from_tinker_path(path).result(timeout=60)
    (run,) = stranger.list_training_runs().result(timeout=60).training_runs
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == copy
    loaded = server.service(other_key).create_training_client_from_state_with_optimizer(copy).result(timeout=60)
    assert logprobs_of(loaded.forward(DATA, "cross_entropy").result(timeout=60)) == logprobs


def test_others_load_and_sample_by_token_and_publication(
    training: tinker.TrainingClient, logprobs: list[list[float]], server: ServerProcess, key: str
) -> None:
    path = saved(training, "shared")
    service = server.service(new_key())
    by_token = service.create_training_client_from_state(path, weights_access_token=key).result(timeout=60)
    assert logprobs_of(by_token.forward(DATA, "cross_entropy").result(timeout=60)) == logprobs
    refused = service.create_training_client_from_state
    with pytest.raises(tinker.RequestFailedError, match="does not exist"):
        refused(path).result(timeout=60)
    named = training.save_weights_for_sampler("shared").result(timeout=60).path
    server.rest_client(key).publish_checkpoint_from_tinker_path(named).result(timeout=60)
    sampling = service.create_sampling_client(model_path=named)
    params = types.SamplingParams(max_tokens=3, temperature=0.0)
    prompt = types.ModelInput.from_ints([11, 12, 13])
    before = sampling.sample(prompt, 1, params).result(timeout=60).sequences[0].tokens
    # A sampling session keeps the weights that it took.
    server.rest_client(key).delete_checkpoint_from_tinker_path(named).result(timeout=60)
    assert sampling.sample(prompt, 1, params).result(timeout=60).sequences[0].tokens == before


def test_archives_of_old_sdks_hold_the_same_adapter(
    training: tinker.TrainingClient, server: ServerProcess, key: str, tmp_path: Path
) -> None:
    path = saved(training, "archive")
    own = files_at(server.rest_client(key), exported(training, "archived"))
    with server.http(key) as http:
        run_id = path.removeprefix("tinker://").partition("/")[0]
        url = http.get(f"training_runs/{run_id}/checkpoints/weights/archive/archive").headers["location"]
    with urllib.request.urlopen(url, timeout=60) as answer:
        (tmp_path / "archive.tar").write_bytes(answer.read())
    with tarfile.open(tmp_path / "archive.tar", "r") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    unpacked = tmp_path / "unpacked"
    assert (unpacked / "checkpoint_complete").exists()
    assert (unpacked / "adapter_config.json").read_bytes() == own["adapter_config.json"]
    found = safetensors.numpy.load_file(unpacked / "adapter_model.safetensors")
    expected = safetensors.numpy.load(own["adapter_model.safetensors"])
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
