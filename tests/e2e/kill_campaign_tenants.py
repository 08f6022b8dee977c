"""The tenants of the kill campaign, each a plain user's loop around the official SDK, in a process of their own.

    python tests/e2e/kill_campaign_tenants.py URL SEED NUM_TENANTS

Each tenant repeats its round: a fresh run, then the same calls with the same data every time. Whatever it is told goes
to standard output as one JSON line per answer, which the campaign compares with an undisturbed round at once.
A line on standard input ends every tenant behind its current round. There is no handling of errors here, because there
must be none: an exception is written as a line, and the exit status is 1.
Invariant: what a tenant tells depends on the seed, its number and the state of its run, never on time or company.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import httpx
import numpy as np
import tinker
import torch
from e2e_support import MODEL, batch, failure_of
from tinker import types

# Longer than any recovery that is to be called one, and shorter than a campaign's patience.
RESULT_S = 150.0
ADAM = types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0)
PROMPT = types.ModelInput.from_ints([11, 12, 13, 14, 15])
# Two whole blocks of the sampler's cache of prompts, and a piece.
LONG_PROMPT = types.ModelInput.from_ints([(7 * i) % 900 + 10 for i in range(150)])
# Long enough that nobody sees the end of it before it is cancelled.
ENDLESS = 1_800
# Requests of a sampling session that the SDK does not number: a clone of its own has them.
OWN_NUMBERS = 7_000_000_000
# Batches of (datums, tokens of each): small ones live in a row of the queue; large ones are cut over several cycles,
# and their payload is a blob.
SMALL = (2, 24)
LARGE = (24, 200)


# Takes an answer: what it is, its value, and a path where more of it is to be found, which differs from round to round.
Tell = Callable[[str, object, str | None], None]


class User:
    """One tenant's hands: the SDK's calls, with every answer written down."""

    def __init__(
        self,
        service: tinker.ServiceClient,
        tell: Tell,
        seed: int,
        *,
        url: str,
        api_key: str,
        losses: dict[str, tinker.LossHandle],
    ) -> None:
        self.service = service
        self.losses = losses
        self._url = url
        self._api_key = api_key
        self.random = random.Random(seed)
        self._tell = tell
        self._seed = seed

    def new_run(self, rank: int = 8) -> tinker.TrainingClient:
        future = self.service.create_lora_training_client(base_model=MODEL, rank=rank, seed=self._seed)
        return future.result(timeout=RESULT_S)

    def data(self, step: int, shape: tuple[int, int] = SMALL) -> list[types.Datum]:
        """The batch of a step, for cross_entropy."""
        return batch(*shape, seed=self._seed * 1000 + step)

    def policy_data(self, step: int, shape: tuple[int, int] = SMALL) -> list[types.Datum]:
        """The batch of a step, for the losses on sampling logprobs and advantages."""
        return [self._policy_datum(datum) for datum in self.data(step, shape)]

    def _policy_datum(self, datum: types.Datum) -> types.Datum:
        targets = datum.loss_fn_inputs["target_tokens"].tolist()
        return policy_datum(
            datum.model_input,
            targets,
            logprobs=[-self.random.uniform(1.0, 8.0) for _ in targets],
            advantages=[self.random.uniform(-1.0, 1.0) for _ in targets],
        )

    def passed(self, future: Any) -> None:
        """A forward or forward_backward: its metrics, and the bits of its logprobs."""
        output = future.result(timeout=RESULT_S)
        arrays = [np.asarray(fields["logprobs"].tolist(), np.float32) for fields in output.loss_fn_outputs]
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
        self._tell("passed", {"metrics": output.metrics, "logprobs": digest}, None)

    def stepped(self, future: Any) -> None:
        """An optim_step: its metrics, the step's number among them."""
        self._tell("stepped", future.result(timeout=RESULT_S).metrics, None)

    def saved(self, future: Any) -> str:
        """A named save of either kind; its path."""
        path: str = future.result(timeout=RESULT_S).path
        self._tell("saved", path.rpartition("/")[2], None)
        return path

    def loaded(self, future: Any) -> None:
        future.result(timeout=RESULT_S)
        self._tell("loaded", None, None)

    def sampled(self, future: Any) -> types.SampleResponse:
        """A sample with a seed: its tokens and their logprobs."""
        response: types.SampleResponse = future.result(timeout=RESULT_S)
        self._tell("sampled", [[list(one.tokens), list(one.logprobs or [])] for one in response.sequences], None)
        return response

    def scored_sample(self, future: Any) -> None:
        """A sample and what is asked about its prompt. How much came from a cache is the worker's own affair."""
        response = self.sampled(future)
        self._tell("prompt", [list(response.prompt_logprobs or []), response.topk_prompt_logprobs], None)

    def cancelled(self, sampler: tinker.SamplingClient, number: int) -> None:
        """A sample that is sent and cancelled, which the SDK has no call for; sent again until there is an answer."""
        answer = self._post(
            "asample",
            {
                "sampling_session_id": sampler._sampling_session_id,
                "seq_id": OWN_NUMBERS + number,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT.to_ints()}]},
                "sampling_params": {"max_tokens": ENDLESS, "seed": number, "stop": []},
            },
        )
        wanted = {"request_id": answer["request_id"]}
        self._post("cancel_future", wanted)
        answer = self._post("retrieve_future", wanted)
        self._tell("cancelled", [answer.get("category"), answer.get("error")], None)

    def _post(self, name: str, body: dict[str, object]) -> dict[str, Any]:
        deadline = time.monotonic() + RESULT_S
        headers = {"X-API-Key": self._api_key}
        while True:
            try:
                answer = httpx.post(f"{self._url}/api/v1/{name}", json=body, headers=headers, timeout=60)
                if answer.status_code < 400:
                    return dict(answer.json())
                assert answer.status_code in (408, 429) or answer.status_code >= 500, answer.text
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, f"{name} is not answered"
            time.sleep(0.2)

    def exported(self, future: Any) -> None:
        """External weights, whose files are compared with the states at the end."""
        path: str = future.result(timeout=RESULT_S).path
        self._tell("exported", path.rpartition("/")[2], path)

    def scored(self, future: Any) -> None:
        """Logprobs of a prompt."""
        self._tell("scored", list(future.result(timeout=RESULT_S)), None)

    def refused(self, future: Any) -> None:
        """A request that is this user's own mistake."""
        error = failure_of(future, timeout_s=RESULT_S)
        assert error is not None, "a mistaken request succeeded"
        # Behind the reason the SDK names the request, whose id has the session's.
        self._tell("refused", [error.category.value, error.message.partition(" for self.request_id")[0]], None)

    def ends(self, client: tinker.TrainingClient) -> None:
        """The run's last words: logprobs of data that it was not trained on, and everything it is in a file."""
        self.passed(client.forward(self.data(999), "cross_entropy"))
        path: str = client.save_state("final").result(timeout=RESULT_S).path
        self._tell("ended", None, path)


def policy_datum(
    model_input: types.ModelInput, targets: Sequence[int], *, logprobs: Sequence[float], advantages: Sequence[float]
) -> types.Datum:
    inputs = {"target_tokens": list(targets), "logprobs": list(logprobs), "advantages": list(advantages)}
    return types.Datum(model_input=model_input, loss_fn_inputs=inputs)


def params(seed: int, max_tokens: int = 24) -> types.SamplingParams:
    return types.SamplingParams(max_tokens=max_tokens, seed=seed, stop=[])


def supervised(user: User) -> None:
    """Small batches, each answer read before the next call; a save now and then, and a way back to it."""
    client = user.new_run()
    for step in range(8):
        user.passed(client.forward_backward(user.data(step), "cross_entropy"))
        user.stepped(client.optim_step(ADAM))
        if step % 3 == 1:
            path = user.saved(client.save_state(f"at-{step}"))
        if step % 3 == 2:
            user.loaded(client.load_state_with_optimizer(path))
    user.ends(client)


def large_batches(user: User) -> None:
    """Passes that are split over cycles, their payloads blobs."""
    client = user.new_run(rank=4)
    for step in range(4):
        passed = client.forward_backward(user.data(step, LARGE), "cross_entropy")
        stepped = client.optim_step(ADAM)
        user.passed(passed)
        user.stepped(stepped)
    user.ends(client)


def pipelined(user: User) -> None:
    """Three steps submitted ahead of their results, with losses in turn."""
    client = user.new_run(rank=16)
    losses: tuple[types.LossFnType, ...] = ("importance_sampling", "ppo", "cispo")
    for first in range(0, 9, 3):
        ahead = []
        for step in range(first, first + 3):
            passed = client.forward_backward(user.policy_data(step), losses[step % 3])
            ahead.append((passed, client.optim_step(ADAM)))
        for passed, stepped in ahead:
            user.passed(passed)
            user.stepped(stepped)
    user.ends(client)


def reinforcement(user: User) -> None:
    """Samples from the newest weights, trains on what it sampled; the weights to sample from have no name."""
    client = user.new_run()
    losses: tuple[types.LossFnType, ...] = ("importance_sampling", "gspo")
    prompt = PROMPT.to_ints()
    for step in range(4):
        sampler = client.save_weights_and_get_sampling_client().result(timeout=RESULT_S)
        response = user.sampled(sampler.sample(prompt=PROMPT, num_samples=3, sampling_params=params(step)))
        data = []
        for index, sequence in enumerate(response.sequences):
            tokens, padding = [*prompt, *sequence.tokens], [0.0] * (len(prompt) - 1)
            data.append(
                policy_datum(
                    types.ModelInput.from_ints(tokens[:-1]),
                    tokens[1:],
                    logprobs=[*padding, *(sequence.logprobs or [])],
                    advantages=[*padding, *[1.0 - index] * len(sequence.tokens)],
                )
            )
        passed = client.forward_backward(data, losses[step % 2])
        user.stepped(client.optim_step(ADAM))
        user.passed(passed)
    user.ends(client)


def checkpoints(user: User) -> None:
    """Saves, overwrites and loads, with and without the optimiser, also in the middle of a step."""
    client = user.new_run()

    def train(run: tinker.TrainingClient, step: int) -> None:
        passed = run.forward_backward(user.data(step), "cross_entropy")
        stepped = run.optim_step(ADAM)
        user.passed(passed)
        user.stepped(stepped)

    train(client, 0)
    early = user.saved(client.save_state("early"))
    train(client, 1)
    user.passed(client.forward_backward(user.data(2), "cross_entropy"))
    with_gradient = user.saved(client.save_state("with-gradient"))
    user.stepped(client.optim_step(ADAM))
    user.loaded(client.load_state_with_optimizer(early))
    # What was loaded stays what it was, whatever becomes of the name.
    user.saved(client.save_state("early-again"))
    train(client, 3)
    user.saved(client.save_state("early", overwrite=True))
    train(client, 4)
    user.loaded(client.load_state(with_gradient))
    train(client, 5)
    fork = user.service.create_training_client_from_state_with_optimizer(with_gradient).result(timeout=RESULT_S)
    user.stepped(fork.optim_step(ADAM))
    train(fork, 6)
    user.ends(fork)
    fresh = user.service.create_training_client_from_state(early).result(timeout=RESULT_S)
    train(fresh, 7)
    user.ends(fresh)
    user.ends(client)


def sampling(user: User) -> None:
    """Publishes under names and samples a lot, several at a time."""
    client = user.new_run(rank=4)
    for step in range(3):
        passed = client.forward_backward(user.data(step), "cross_entropy")
        stepped = client.optim_step(ADAM)
        user.passed(passed)
        user.stepped(stepped)
        path = user.saved(client.save_weights_for_sampler(f"at-{step}"))
        sampler = user.service.create_sampling_client(model_path=path).result(timeout=RESULT_S)
        several = [
            sampler.sample(prompt=PROMPT, num_samples=2, sampling_params=params(10 * step + index, max_tokens=60))
            for index in range(4)
        ]
        scored = sampler.compute_logprobs(PROMPT)
        for future in several:
            user.sampled(future)
        user.scored(scored)
    user.ends(client)


def accumulating(user: User) -> None:
    """Several passes per step, forward passes between them, and one pass in each step that is refused."""
    client = user.new_run(rank=8)
    for step in range(4):
        passes = [
            client.forward_backward(user.data(10 * step), "cross_entropy"),
            client.forward_backward(user.policy_data(10 * step + 1), "dro", {"beta": 0.1}),
            client.forward(user.data(10 * step + 2), "cross_entropy"),
        ]
        mistaken = client.forward_backward(user.data(step), "cross_entropy", {"no_such_setting": 1.0})
        passes.append(client.forward_backward(user.data(10 * step + 3), "cross_entropy"))
        for passed in passes:
            user.passed(passed)
        user.refused(mistaken)
        user.stepped(client.optim_step(ADAM))
    user.ends(client)


def large_and_ahead(user: User) -> None:
    """Large batches, two steps ahead, an ephemeral save between them."""
    client = user.new_run(rank=8)
    for step in range(0, 4, 2):
        first = client.forward_backward(user.policy_data(step, LARGE), "ppo")
        first_step = client.optim_step(ADAM)
        publishing = client.save_weights_and_get_sampling_client()
        second = client.forward_backward(user.data(step + 1), "cross_entropy")
        second_step = client.optim_step(ADAM)
        user.passed(first)
        user.stepped(first_step)
        sampler = publishing.result(timeout=RESULT_S)
        user.scored(sampler.compute_logprobs(PROMPT))
        user.passed(second)
        user.stepped(second_step)
    user.ends(client)


def clipped_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> Any:
    """A loss that no table has."""
    ratio = torch.exp(logprobs - old_logprobs)
    objective = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    spread = logprobs[:, None] - logprobs[None, :]
    return -objective.mean() + 0.01 * spread.pow(2).mean(), {"custom/ratio:mean": ratio.mean()}


def custom_losses(user: User) -> None:
    """A loss traced on the client and run on the server, on small and large batches; weights for others to read."""
    if not user.losses:
        # Once: a session does not take the same loss twice.
        ranks: Any = {"logprobs": 1, "old_logprobs": 1, "advantages": 1}
        user.losses["mine"] = user.service.create_custom_loss(clipped_ratio, ranks).result(timeout=RESULT_S)
    handle = user.losses["mine"]
    client = user.new_run(rank=8)
    for step in range(4):
        data = user.policy_data(step, (8, 60) if step % 2 else SMALL)
        for datum in data:
            datum.loss_fn_inputs["old_logprobs"] = datum.loss_fn_inputs.pop("logprobs")
        passed = client.forward_backward_custom(data, handle)
        stepped = client.optim_step(ADAM)
        user.passed(passed)
        user.stepped(stepped)
        if step % 2:
            user.exported(client.save_weights_external(f"external-{step}"))
    user.ends(client)


def recorded(user: User) -> None:
    """Samples on record and passes that train on the records; long prompts, scored; inflight clients; cancels."""
    client = user.new_run(rank=4)
    for step in range(3):
        sampler = client.save_weights_and_get_sampling_client(record_stability_info=True).result(timeout=RESULT_S)
        user.cancelled(sampler, step)
        response = user.sampled(sampler.sample(LONG_PROMPT, 2, params(step)))
        user.scored_sample(
            sampler.sample(
                LONG_PROMPT,
                1,
                params(step + 10),
                include_prompt_logprobs=True,
                topk_prompt_logprobs=2,
                prompt_logprobs_last_n=9,
            )
        )
        data = [recorded_datum(sequence, 1.0 - index) for index, sequence in enumerate(response.sequences)]
        passed = client.forward_backward(data, "stable_reinforce", {"kl_coeff": 0.1})
        stepped = client.optim_step(ADAM)
        user.passed(passed)
        user.stepped(stepped)
        inflight = client.save_weights_and_get_sampling_client(kind="inflight").result(timeout=RESULT_S)
        user.sampled(inflight.sample(PROMPT, 2, params(step)))
        user.passed(client.forward_backward(data, "stable_reinforce"))
        user.stepped(client.optim_step(ADAM))
    user.ends(client)


def recorded_datum(sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """A sequence behind LONG_PROMPT, which names its record for every token."""
    tokens, id_ = list(sequence.tokens), sequence.sequence_id
    assert id_ is not None
    num_before = LONG_PROMPT.length - 1
    targets = [*([0] * num_before), *tokens]
    return policy_datum(
        LONG_PROMPT.append(types.EncodedTextChunk(tokens=tokens[:-1])),
        targets,
        logprobs=[*([0.0] * num_before), *(sequence.logprobs or [])],
        advantages=[*([0.0] * num_before), *([advantage] * len(tokens))],
    ).with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id=id_, length=LONG_PROMPT.length),
            types.SampledProvenanceSpan(sequence_id=id_, length=len(tokens) - 1),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id=id_, offset=1, length=num_before),
            types.SampledProvenanceSpan(sequence_id=id_, length=len(tokens)),
        ],
    )


ROUNDS: tuple[Callable[[User], None], ...] = (
    supervised,
    large_batches,
    pipelined,
    reinforcement,
    checkpoints,
    sampling,
    accumulating,
    large_and_ahead,
    custom_losses,
    recorded,
)


class Tenant(threading.Thread):
    """One tenant with one session and one key, until it is told to stop."""

    def __init__(self, url: str, index: int, *, seed: int, is_over: threading.Event, lock: threading.Lock) -> None:
        super().__init__(daemon=True)
        self.has_failed = False
        self._url = url
        self._index = index
        self._seed = seed * len(ROUNDS) + index
        self._is_over = is_over
        self._lock = lock
        self._round = 0

    def run(self) -> None:
        """Round after round. What stops it is written down, and nothing is tried again."""
        try:
            api_key = f"tml-kill-{self._index}"
            service = tinker.ServiceClient(base_url=self._url, api_key=api_key)
            losses: dict[str, tinker.LossHandle] = {}
            while True:
                user = User(service, self._tell, self._seed, url=self._url, api_key=api_key, losses=losses)
                ROUNDS[self._index % len(ROUNDS)](user)
                self._tell("round over", None, None)
                if self._is_over.is_set():
                    return
                self._round += 1
        except BaseException:
            self.has_failed = True
            self._tell("error", traceback.format_exc(), None)

    def _tell(self, what: str, value: object, path: str | None) -> None:
        told = {"tenant": self._index, "round": self._round, "what": what, "value": value, "path": path}
        with self._lock:
            print(json.dumps(told), flush=True)


def main() -> int:
    url, seed, num_tenants = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # load_state is deprecated, and still what many scripts call.
    warnings.simplefilter("ignore", FutureWarning)
    is_over, lock = threading.Event(), threading.Lock()
    tenants = [Tenant(url, index, seed=seed, is_over=is_over, lock=lock) for index in range(num_tenants)]
    for tenant in tenants:
        tenant.start()
    sys.stdin.readline()
    is_over.set()
    for tenant in tenants:
        tenant.join()
    return int(any(tenant.has_failed for tenant in tenants))


if __name__ == "__main__":
    status = main()
    # The SDK's own thread would be waited for.
    os._exit(status)
