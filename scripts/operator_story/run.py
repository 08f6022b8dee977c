"""Plays the operator's whole story against a live server, with the real SDK and httpx, and checks every turn of it.

    scripts/story                 # all chapters, on a server of its own
    scripts/story --old-sdk ""    # without the second SDK version, which needs the network once

A first key appears in a file. Strangers are refused, members of the organisation come in with their ModelScope tokens.
A quota stops a member and is raised. A loss is submitted, refused, reviewed, approved, used from two SDK versions and
revoked. A key is revoked in the middle of a run. At the end the audit log and the usage are read back: they are exact.
Exit status: 0 when every turn came out as told.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tinker
from environments import python_of
from rich.console import Console
from tinker import types

from operator_story.stand_in import MEMBER, ORGANIZATION, OUTSIDER, modelscope

MODEL = "treadle/tiny"
LOSS = "asymmetric_clip"
# What its author writes: the same signature as a custom loss of the SDK, one datum at a time.
LOSS_FILE = '''\
import torch


def loss(logprobs, old_logprobs, advantages):
    """PPO with a wider upper bound."""
    ratio = torch.exp(logprobs - old_logprobs)
    objective = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.3) * advantages)
    return -objective.sum(), {"custom/ratio:mean": ratio.mean()}


INPUTS = {"logprobs": 1, "old_logprobs": 1, "advantages": 1}
'''
HOSTILE_FILE = """\
import os

import torch


def loss(logprobs, advantages):
    os.environ["PATH"], open("/etc/passwd").read()
    return -(logprobs * advantages).sum(), {}


INPUTS = {"logprobs": 1, "advantages": 1}
"""
WAIT_S = 120
# The SDK repeats the server's notice about stable_reinforce for every session.
logging.getLogger("tinker").setLevel(logging.ERROR)
console = Console(highlight=False)


class Story:
    """What the chapters share: the server, the operator's key, and what was used so far."""

    def __init__(self, url: str, admin_key: str, old_python: Path | None) -> None:
        self.url = url
        self.old_python = old_python
        self.admin = httpx.Client(base_url=f"{url}/admin/v1", headers={"X-API-Key": admin_key}, timeout=60)
        self.admin_key = admin_key
        # Tokens of passes and samples that were answered, by tenant.
        self.trained: dict[str, int] = {}
        self.sampled: dict[str, int] = {}

    def user(self, token: str) -> httpx.Client:
        """Raw HTTP in a user's name."""
        return httpx.Client(base_url=f"{self.url}/api/v1", headers={"X-API-Key": token}, timeout=60)

    def service(self, token: str) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=token)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """An admin call that must succeed: its JSON."""
        answer = self.admin.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None


def a_stranger_is_refused(story: Story) -> None:
    """An unknown token: 401, at once."""
    with story.user("tml-" + "0" * 43) as http:
        answer = http.get("/get_server_capabilities")
    assert answer.status_code == 401, answer.text
    told(f"401: {answer.json()['detail']}")
    with httpx.Client(base_url=story.url) as http:
        assert http.get("/admin/v1/tenants").status_code == 401
        assert http.get("/healthz").status_code == 200


def an_outsider_learns_how_to_join(story: Story) -> None:
    """A real ModelScope user who is no member: 403 with the organisation's name."""
    with story.user(OUTSIDER) as http:
        answer = http.get("/get_server_capabilities")
    assert answer.status_code == 403, answer.text
    assert ORGANIZATION in answer.json()["detail"], answer.text
    told(f"403: {answer.json()['detail']}")


def a_member_trains(story: Story) -> None:
    """A member's token works in every form in which clients send it, and the SDK trains with it."""
    with httpx.Client(base_url=f"{story.url}/api/v1") as http:
        for headers in (
            {"Authorization": f"Bearer {MEMBER}"},
            {"Twinkle-Authorization": f"Bearer {MEMBER}"},
            {"X-API-Key": f"tml-{MEMBER}"},
        ):
            assert http.get("/get_server_capabilities", headers=headers).status_code == 200, headers
    service = story.service(f"tml-{MEMBER}")
    training = service.create_lora_training_client(MODEL, rank=8, seed=1).result(timeout=WAIT_S)
    losses = [_step(story, "ms:mei", training) for _ in range(4)]
    assert losses[-1] < losses[0], losses
    sampler = training.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=8, stop=[])
    drawn = sampler.sample(types.ModelInput.from_ints([20, 27, 34]), 2, params).result(timeout=WAIT_S)
    story.sampled["ms:mei"] = sum(len(sequence.tokens) for sequence in drawn.sequences)
    told(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; samples {[sequence.tokens for sequence in drawn.sequences]}")


def a_quota_is_reached_and_raised(story: Story) -> None:
    """A rank beyond the limit is refused through the future; too many tokens a minute wait until it is raised."""
    story.ask("PUT", f"/quotas/organization:{ORGANIZATION}", {"max_lora_rank": 4})
    _within_a_second(lambda: _refusal_of_rank(story, 8) is not None)
    refusal = _refusal_of_rank(story, 8)
    assert refusal is not None
    assert "4" in refusal, refusal
    told(f"rank 8: {refusal}")
    assert _refusal_of_rank(story, 4) is None
    training = story.service(f"tml-{MEMBER}").create_lora_training_client(MODEL, rank=4).result(timeout=WAIT_S)
    story.ask("PUT", "/quotas/tenant:ms:mei", {"trained_tokens_per_minute": 100})
    time.sleep(1)
    _step(story, "ms:mei", training)  # 128 tokens: it may begin, and the debt is waited off
    waiting = threading.Thread(target=_step, args=(story, "ms:mei", training))
    began = time.monotonic()
    waiting.start()
    reason = _reason_of_waiting(story, training)
    assert "100" in reason, reason
    told(f"waits: {reason}")
    story.ask("PUT", "/quotas/tenant:ms:mei", {"trained_tokens_per_minute": None})
    waiting.join(timeout=WAIT_S)
    assert not waiting.is_alive(), "the step still waits though its quota is gone"
    told(f"went on {time.monotonic() - began:.1f} s after it was sent, when the quota was gone")
    story.ask("DELETE", f"/quotas/organization:{ORGANIZATION}")


def a_loss_is_submitted_and_refused(story: Story) -> None:
    """Whoever submits a loss cannot use it before an operator approves it; a hostile one never is."""
    with story.user(MEMBER) as http:
        for name, source in ((LOSS, LOSS_FILE), ("hostile", HOSTILE_FILE)):
            answer = http.post("/losses", json={"name": name, "form": "python", "content": source})
            assert answer.is_success, answer.text
    refusal = _refusal_of_loss(story)
    assert refusal is not None
    assert LOSS in refusal, refusal
    assert "POST /api/v1/losses" in refusal, refusal
    told(refusal)
    hostile = _named(story, "hostile")
    story.admin.post(f"/losses/named/{hostile['named_loss_id']}/review")
    seen = _reviewed(story, "hostile")
    answer = story.admin.post(f"/losses/named/{hostile['named_loss_id']}/approve", json={})
    assert answer.status_code == 400, f"a loss that opens files was approved: {answer.text}"
    story.ask("POST", f"/losses/named/{hostile['named_loss_id']}/reject", {"reason": "it opens files"})
    told(f"review of the hostile one: {seen['review'].get('reason') or seen['review']}")


def the_loss_is_approved_and_used(story: Story) -> None:
    """The operator sees source, hash and dry run, approves it, and two SDK versions train with it."""
    story.ask("POST", f"/losses/named/{_named(story, LOSS)['named_loss_id']}/review")
    seen = _reviewed(story, LOSS)
    assert LOSS_FILE in str(seen["content"]) or "torch.minimum" in str(seen), seen
    assert seen["review"]["is_ok"], seen["review"]
    story.ask("POST", f"/losses/named/{seen['named_loss_id']}/approve", {"tenants": ["ms:mei"]})
    _within_a_second(lambda: _refusal_of_loss(story) is None)
    training = story.service(f"tml-{MEMBER}").create_lora_training_client(MODEL, rank=8, seed=1).result(timeout=WAIT_S)
    output = training.forward_backward(_policy_datums(), LOSS).result(timeout=WAIT_S)
    told(f"tinker {tinker.__version__}: {dict(output.metrics)}")
    _count(story, "ms:mei", 2)
    if story.old_python is not None:
        here = Path(__file__).with_name("old_sdk.py")
        command = [str(story.old_python), str(here), story.url, MODEL, LOSS]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "TINKER_API_KEY": f"tml-{MEMBER}"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        version, total = done.stdout.split()
        assert float(total) == output.metrics["loss:sum"], (total, output.metrics)
        told(f"tinker {version}: the same loss, to the bit")
        _count(story, "ms:mei", 2)


def the_loss_is_revoked(story: Story) -> None:
    """From the next cycle on nobody runs it."""
    story.ask("POST", f"/losses/named/{_named(story, LOSS)['named_loss_id']}/revoke", {"reason": "it was a mistake"})
    _within_a_second(lambda: _refusal_of_loss(story) is not None)
    told(str(_refusal_of_loss(story)))


def a_key_is_revoked_mid_run(story: Story) -> None:
    """A user's loop ends within a second of the revocation; the operator's other users go on."""
    made = story.ask("POST", "/keys", {"user": "karl", "name": "laptop"})
    training = story.service(made["key"]).create_lora_training_client(MODEL, rank=4).result(timeout=WAIT_S)
    _step(story, "user:karl", training)
    story.ask("DELETE", f"/keys/{made['key_id']}")
    with story.user(made["key"]) as http:
        _within_a_second(lambda: http.get("/get_server_capabilities").status_code == 401)
    try:
        training.forward_backward(_datums(), "cross_entropy").result(timeout=WAIT_S)
    except tinker.APIError as error:
        told(f"the loop ends with {type(error).__name__}")
    else:
        raise AssertionError("a revoked key still trains")
    with story.user(MEMBER) as http:
        assert http.get("/get_server_capabilities").status_code == 200


def the_books_are_right(story: Story) -> None:
    """Every decision is in the audit log, with its author; usage is what was answered, to the token."""
    entries = story.ask("GET", "/audit?limit=1000")["events"]
    events = [entry["event"] for entry in entries]
    for wanted in ("quota.set", "loss.approved", "loss.rejected", "loss.revoked", "key.created", "key.revoked"):
        assert wanted in events, (wanted, sorted(set(events)))
    assert all(entry["actor"] for entry in entries if entry["event"].startswith(("quota", "loss", "key")))
    rows = story.ask("GET", "/usage?group_by=tenant")["data"]
    for amount, counted in (("training_tokens", story.trained), ("sampled_tokens", story.sampled)):
        used = {row["tenant_id"]: row[amount] for row in rows if row[amount]}
        assert used == counted, (amount, used, counted)
    csv = story.admin.get("/usage.csv", params={"group_by": "tenant"})
    assert csv.status_code == 200
    assert "ms:mei" in csv.text
    raw = f"{entries} {rows} {csv.text}"
    assert MEMBER not in raw
    assert story.admin_key not in raw
    told(f"{len(entries)} entries of audit; tokens trained {story.trained} and sampled {story.sampled}, exactly")


CHAPTERS: tuple[Callable[[Story], None], ...] = (
    a_stranger_is_refused,
    an_outsider_learns_how_to_join,
    a_member_trains,
    a_quota_is_reached_and_raised,
    a_loss_is_submitted_and_refused,
    the_loss_is_approved_and_used,
    the_loss_is_revoked,
    a_key_is_revoked_mid_run,
    the_books_are_right,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old-sdk", default="0.16.1", help='the second SDK version; "" for none')
    args = parser.parse_args()
    old_python = python_of(args.old_sdk) if args.old_sdk else None
    with server() as (url, admin_key):
        story = Story(url, admin_key, old_python)
        for chapter in CHAPTERS:
            console.print(f"[bold]{chapter.__name__.replace('_', ' ')}[/]")
            chapter(story)
    console.print("[bold green]the whole story came out as told[/]")
    return 0


@contextmanager
def server() -> Iterator[tuple[str, str]]:
    """A server for members of the organisation and holders of keys; its URL, and the first key that it made."""
    with modelscope() as modelscope_url, tempfile.TemporaryDirectory(prefix="treadle-story-") as folder:
        key_file = Path(folder) / "first-key"
        env = os.environ | {
            "TREADLE_WORKER__SPARE": "false",
            "TREADLE_AUTH__METHODS": '["keys", "modelscope"]',
            "TREADLE_AUTH__BOOTSTRAP_KEY_FILE": str(key_file),
            "TREADLE_AUTH__MODELSCOPE__ENDPOINT": modelscope_url,
            "TREADLE_AUTH__MODELSCOPE__ORGANIZATION": ORGANIZATION,
        }
        command = [sys.executable, "-m", "treadle.cli", "serve", "--port", "0", "--data", f"{folder}/data"]
        log = (Path(folder) / "server.log").open("w")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().strip()
            assert ready.startswith("treadle ready: "), (Path(folder) / "server.log").read_text()[-3000:]
            assert key_file.stat().st_mode & 0o077 == 0, "others can read the first key"
            yield ready.removeprefix("treadle ready: "), key_file.read_text().strip()
        finally:
            process.terminate()
            process.wait(timeout=60)
            log.close()
        written = (Path(folder) / "server.log").read_text()
        assert MEMBER not in written, "the log has a token"
        assert OUTSIDER not in written, "the log has a token"


def told(text: str) -> None:
    """One line of what was seen."""
    console.print(f"    {text}", style="dim", markup=False, soft_wrap=True)


def _datums() -> list[types.Datum]:
    """Two datums of 64 tokens."""
    tokens = [(7 * position) % 200 + 20 for position in range(65)]
    inputs = {"target_tokens": np.array(tokens[1:]), "weights": np.ones(64, np.float32)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=_tensors(inputs))
    return [datum, datum]


def _policy_datums() -> list[types.Datum]:
    tokens = [(5 * position) % 200 + 20 for position in range(65)]
    inputs = {
        "target_tokens": np.array(tokens[1:]),
        "old_logprobs": np.full(64, -7.0, np.float32),
        "advantages": np.linspace(-1, 1, 64, dtype=np.float32),
    }
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=_tensors(inputs))
    return [datum, datum]


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, tinker.TensorData]:
    return {name: tinker.TensorData.from_numpy(array) for name, array in arrays.items()}


def _count(story: Story, tenant: str, num_datums: int) -> None:
    story.trained[tenant] = story.trained.get(tenant, 0) + 64 * num_datums


def _step(story: Story, tenant: str, training: tinker.TrainingClient) -> float:
    """One pass and one step; the loss."""
    passed = training.forward_backward(_datums(), "cross_entropy")
    stepped = training.optim_step(types.AdamParams(learning_rate=1e-3))
    total = passed.result(timeout=WAIT_S).metrics["loss:sum"]
    stepped.result(timeout=WAIT_S)
    _count(story, tenant, 2)
    return float(total) / 128


def _refusal_of_rank(story: Story, rank: int) -> str | None:
    try:
        story.service(f"tml-{MEMBER}").create_lora_training_client(MODEL, rank=rank).result(timeout=WAIT_S)
    except (tinker.APIError, tinker.RequestFailedError) as error:
        return str(error)
    return None


def _refusal_of_loss(story: Story) -> str | None:
    training = story.service(f"tml-{MEMBER}").create_lora_training_client(MODEL, rank=4).result(timeout=WAIT_S)
    try:
        training.forward(_policy_datums(), LOSS).result(timeout=WAIT_S)
    except (tinker.APIError, tinker.RequestFailedError) as error:
        return str(error)
    _count(story, "ms:mei", 2)
    return None


def _reason_of_waiting(story: Story, training: tinker.TrainingClient) -> str:
    """Why the run's newest pass waits, as its user can ask."""
    run_id = training.model_id
    with story.user(MEMBER) as http:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for seq_id in range(1, 12):
                answer = http.get(f"/treadle/requests/{run_id}:{seq_id}")
                if answer.status_code == 200 and answer.json().get("queue_state") == "paused_rate_limit":
                    return str(answer.json()["reason"])
            time.sleep(0.2)
    raise AssertionError("nothing waits for the quota")


def _named(story: Story, name: str) -> dict[str, Any]:
    found = [entry for entry in story.ask("GET", "/losses/named?limit=100")["data"] if entry["name"] == name]
    assert found, name
    return dict(story.ask("GET", f"/losses/named/{found[0]['named_loss_id']}"))


def _reviewed(story: Story, name: str) -> dict[str, Any]:
    """The submission, once its review is over."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        seen = _named(story, name)
        if seen["review"] is not None and seen["review"].get("state") != "running":
            return seen
        time.sleep(0.5)
    raise AssertionError(f"the review of {name} does not end")


def _within_a_second(is_so: Callable[[], bool]) -> None:
    """Return when it is so. What a decision takes, and the calls that look at it."""
    decided_at = time.monotonic()
    while time.monotonic() - decided_at < 1.0:
        if is_so():
            return
        time.sleep(0.05)
    assert is_so(), "a decision took longer than a second"


if __name__ == "__main__":
    sys.exit(main())
