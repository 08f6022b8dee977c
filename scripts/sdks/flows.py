"""What one SDK version can do against a server, and the numbers that it gets. Run by that version's own Python.

For each check "ok", "absent" (this version has no such method) or "failed" with the error; and the numbers of each
check, which must not depend on the version: floats as hexadecimal, arrays as digests. Every call is one that 0.6.1 has
in the same form, or is looked for first.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterable
from datetime import UTC
from typing import Any

import numpy as np
import tinker
from tinker import types

RANK = 8
SEED = 20_240
WAIT_S = 120
# Of a datum of the policy losses: behind these positions come the sampled tokens.
NUM_PROMPT = 4
CHECKS: dict[str, Callable[[Client], None]] = {}


class Absent(Exception):
    """This version of the SDK cannot do it."""


class Client:
    """One user of the server, and what the checks before have left for the next."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self.service = tinker.ServiceClient(base_url=url, api_key=key)
        self.rest = self.service.create_rest_client()
        self.model = model
        self.numbers: dict[str, object] = {}
        self.training: Any = None
        self.state_path = ""
        self.sampler_path = ""

    def note(self, name: str, value: object) -> None:
        """A number that every version must get."""
        assert name not in self.numbers
        self.numbers[name] = value


def check(function: Callable[[Client], None]) -> Callable[[Client], None]:
    CHECKS[function.__name__] = function
    return function


@check
def capabilities(client: Client) -> None:
    names = [model.model_name for model in client.service.get_server_capabilities().supported_models]
    assert client.model in names, names


@check
def create(client: Client) -> None:
    client.training = new_run(client)
    info = client.training.get_info()
    assert info.model_data.model_name == client.model, info
    assert info.lora_rank == RANK, info


@check
def train_cross_entropy(client: Client) -> None:
    losses = []
    for step in range(3):
        passed = client.training.forward_backward(datums(step), "cross_entropy")
        stepped = client.training.optim_step(types.AdamParams(learning_rate=1e-3))
        losses.append(loss_of(passed))
        stepped.result(timeout=WAIT_S)
    assert losses[0] != losses[1], losses
    client.note("cross_entropy losses", losses)


@check
def train_with_default_adam(client: Client) -> None:
    """Up to 0.16.1 this sends an empty adam_params, whose defaults are the server's."""
    client.training.forward_backward(datums(5), "cross_entropy").result(timeout=WAIT_S)
    client.training.optim_step(types.AdamParams()).result(timeout=WAIT_S)
    client.note("loss after a default step", loss_of(client.training.forward(datums(5), "cross_entropy")))


@check
def forward_only(client: Client) -> None:
    passed = client.training.forward(datums(1), "cross_entropy").result(timeout=WAIT_S)
    client.note("forward logprobs", digest(logprobs_of(passed)))
    again = client.training.forward(datums(1), "cross_entropy").result(timeout=WAIT_S)
    assert digest(logprobs_of(again)) == client.numbers["forward logprobs"]


@check
def tensors_without_shape(client: Client) -> None:
    """Hand-made TensorData, whose shape is null or absent on the wire."""
    plain = datums(1)
    bare = [
        types.Datum(
            model_input=datum.model_input,
            loss_fn_inputs={
                name: types.TensorData(data=list(tensor.data), dtype=tensor.dtype)
                for name, tensor in datum.loss_fn_inputs.items()
            },
        )
        for datum in plain
    ]
    passed = client.training.forward(bare, "cross_entropy").result(timeout=WAIT_S)
    assert digest(logprobs_of(passed)) == client.numbers["forward logprobs"]


@check
def several_targets(client: Client) -> None:
    """Targets of two dimensions, dense or sparse as the version likes."""
    import torch

    tokens = ids(7, 20)
    targets = torch.zeros((20, 12), dtype=torch.int64)
    weights = torch.zeros((20, 12), dtype=torch.float32)
    for position in range(4, 20, 5):
        targets[position, :2] = torch.tensor([50 + position, 80 + position])
        weights[position, :2] = torch.tensor([0.75, 0.25])
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs={"target_tokens": targets, "weights": weights}
    )
    passed = client.training.forward([datum], "cross_entropy").result(timeout=WAIT_S)
    assert np.asarray(passed.loss_fn_outputs[0]["logprobs"].to_numpy()).shape == (20, 12)
    client.note("loss of two-dimensional targets", exact(passed.metrics["loss:sum"]))


@check
def several_requests(client: Client) -> None:
    """300 datums: three requests up to 0.6, one since."""
    many = [datum for seed in range(100) for datum in datums(seed, num_tokens=6)]
    passed = client.training.forward(many, "cross_entropy").result(timeout=WAIT_S)
    assert len(passed.loss_fn_outputs) == 300
    client.note("logprobs of 300 datums", digest(logprobs_of(passed)))


@check
def policy_losses(client: Client) -> None:
    for loss_fn, config in (
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}),
        ("cispo", None),
        ("dro", {"beta": 0.125}),
    ):
        options = {} if config is None else {"loss_fn_config": config}
        passed = client.training.forward_backward(policy_datums(), loss_fn, **options)
        client.note(f"{loss_fn} loss", loss_of(passed))
        client.training.optim_step(types.AdamParams(learning_rate=1e-4)).result(timeout=WAIT_S)


@check
def loss_by_metadata(client: Client) -> None:
    """A run in which "ppo" is a loss that older versions cannot name."""
    run = client.service.create_lora_training_client(
        base_model=client.model, rank=RANK, seed=SEED, user_metadata={"treadle.loss.ppo": "gspo"}
    )
    renamed = loss_of(run.forward(policy_datums(), "ppo"))
    assert renamed != loss_of(new_run(client).forward(policy_datums(), "ppo")), renamed
    client.note("gspo loss by metadata", renamed)


@check
def custom_loss(client: Client) -> None:
    """A loss of the client's own, whose gradient goes out as weights."""

    def loss_fn(data: Any, logprobs: Any) -> Any:
        loss = sum((values.exp() ** 2).sum() for values in logprobs)
        return loss, {"peak": float(max(values.max().item() for values in logprobs))}

    passed = client.training.forward_backward_custom(datums(2), loss_fn).result(timeout=WAIT_S)
    client.training.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=WAIT_S)
    client.note("custom loss peak", exact(passed.metrics["peak"]))
    client.note("loss after a custom loss", loss_of(client.training.forward(datums(2), "cross_entropy")))


@check
def refusals(client: Client) -> None:
    """A mistake comes through the future, and the run goes on."""
    broken = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": types.TensorData(data=[2, 3], dtype="int64", shape=[2])},
    )
    for data, word in (([broken], "target_tokens"), ([tokens_beyond_the_vocabulary()], "vocabulary")):
        error = failure_of(client.training.forward_backward(data, "cross_entropy"))
        assert word in str(error), error
        assert "user" in str(error.category).lower(), error.category
    client.training.forward(datums(0), "cross_entropy").result(timeout=WAIT_S)


@check
def save(client: Client) -> None:
    client.state_path = client.training.save_state("step-a").result(timeout=WAIT_S).path
    client.sampler_path = client.training.save_weights_for_sampler("for-sampling").result(timeout=WAIT_S).path
    assert client.state_path == f"tinker://{client.training.model_id}/weights/step-a", client.state_path
    assert client.sampler_path.endswith("/sampler_weights/for-sampling"), client.sampler_path


@check
def restore_with_optimizer(client: Client) -> None:
    """What comes behind the checkpoint is the same to the last bit in the run and in its copy."""
    copy = client.service.create_training_client_from_state_with_optimizer(client.state_path)
    assert copy.model_id != client.training.model_id
    pairs = [[step_of(run, seed) for run in (client.training, copy)] for seed in (11, 12, 13)]
    assert all(mine == theirs for mine, theirs in pairs), pairs
    client.note("losses behind the checkpoint", [mine for mine, _ in pairs])


@check
def restore_weights(client: Client) -> None:
    """Without the optimiser the first pass is the same, and what follows the first step is not."""
    copy = client.service.create_training_client_from_state(client.state_path)
    losses = [step_of(copy, seed) for seed in (11, 12, 13)]
    kept = client.numbers["losses behind the checkpoint"]
    assert losses[0] == kept[0], (losses, kept)  # type: ignore[index]
    assert losses[1:] != kept[1:], losses  # type: ignore[index]


@check
def load_state(client: Client) -> None:
    """A checkpoint into a run of the same shape, as its first request."""
    run = new_run(client)
    run.load_state_with_optimizer(client.state_path).result(timeout=WAIT_S)
    assert [step_of(run, 11)] == client.numbers["losses behind the checkpoint"][:1]  # type: ignore[index]


@check
def sample_named(client: Client) -> None:
    sampler = client.service.create_sampling_client(model_path=client.sampler_path)
    client.note(
        "samples of a checkpoint", samples(sampler, types.SamplingParams(max_tokens=8, seed=5, temperature=0.7))
    )


@check
def sample_training_checkpoint(client: Client) -> None:
    sampler = client.service.create_sampling_client(model_path=client.state_path, base_model=client.model)
    taken = samples(sampler, types.SamplingParams(max_tokens=8, seed=5, temperature=0.7))
    assert taken == client.numbers["samples of a checkpoint"], taken


@check
def sample_base(client: Client) -> None:
    sampler = client.service.create_sampling_client(base_model=client.model)
    client.note("greedy tokens of the base model", samples(sampler, types.SamplingParams(max_tokens=6, temperature=0)))


@check
def sample_unnamed(client: Client) -> None:
    """Weights of this moment, without a name."""
    sampler = client.training.save_weights_and_get_sampling_client()
    client.note("samples of unnamed weights", samples(sampler, types.SamplingParams(max_tokens=6, seed=9, top_k=5)))


@check
def stops(client: Client) -> None:
    """No stop, an empty list, a text, texts, tokens: each is written differently by old versions."""
    sampler = client.service.create_sampling_client(base_model=client.model)
    taken = {}
    first = None
    for name, stop in (("none", None), ("empty", []), ("text", "e"), ("texts", ["e", "q"]), ("tokens", "first")):
        stop = [first] if stop == "first" else stop
        params = types.SamplingParams(max_tokens=12, temperature=0, seed=1, stop=stop)
        sequence = sampler.sample(prompt(), 1, params).result(timeout=WAIT_S).sequences[0]
        first = first if first is not None else list(sequence.tokens)[2]
        taken[name] = [str(sequence.stop_reason).rpartition(".")[2], list(sequence.tokens)]
    assert taken["tokens"][1][-1] == first, taken
    assert taken["tokens"][0] == "stop", taken
    client.note("stops", taken)


@check
def prompt_logprobs(client: Client) -> None:
    sampler = client.service.create_sampling_client(model_path=client.sampler_path)
    params = types.SamplingParams(max_tokens=1, temperature=0)
    answer = sampler.sample(prompt(), 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=3).result(
        timeout=WAIT_S
    )
    assert answer.prompt_logprobs[0] is None, answer.prompt_logprobs
    assert answer.topk_prompt_logprobs[0] is None
    assert all(len(row) == 3 for row in answer.topk_prompt_logprobs[1:])
    client.note("prompt logprobs", digest([float32(answer.prompt_logprobs)]))
    tops = [pair for row in answer.topk_prompt_logprobs[1:] for pair in row]
    client.note("top-k tokens", [int(token) for token, _ in tops])
    client.note("top-k logprobs", digest([float32([value for _, value in tops])]))


@check
def compute_logprobs(client: Client) -> None:
    sampler = client.service.create_sampling_client(model_path=client.sampler_path)
    scored = sampler.compute_logprobs(prompt()).result(timeout=WAIT_S)
    assert scored[0] is None
    assert digest([float32(scored)]) == client.numbers["prompt logprobs"]


@check
def list_runs(client: Client) -> None:
    runs = client.rest.list_training_runs(limit=10).result(timeout=WAIT_S).training_runs
    assert client.training.model_id in [run.training_run_id for run in runs], runs
    run = client.rest.get_training_run(client.training.model_id).result(timeout=WAIT_S)
    assert run.lora_rank == RANK, run
    assert run.last_checkpoint.tinker_path == client.state_path, run
    assert run.last_sampler_checkpoint.tinker_path == client.sampler_path, run


@check
def list_checkpoints(client: Client) -> None:
    if hasattr(client.training, "save_weights_external"):
        client.training.save_weights_external("exported").result(timeout=WAIT_S)
    found = client.rest.list_checkpoints(client.training.model_id).result(timeout=WAIT_S).checkpoints
    kinds = {checkpoint.tinker_path: checkpoint.checkpoint_type for checkpoint in found}
    assert kinds[client.state_path] == "training", kinds
    assert kinds[client.sampler_path] == "sampler", kinds
    mine = client.rest.list_user_checkpoints().result(timeout=WAIT_S).checkpoints
    assert client.state_path in [checkpoint.tinker_path for checkpoint in mine], mine
    info = client.rest.get_weights_info_by_tinker_path(client.state_path).result(timeout=WAIT_S)
    assert (info.base_model, info.lora_rank) == (client.model, RANK), info


@check
def sessions(client: Client) -> None:
    listed = client.rest.list_sessions().result(timeout=WAIT_S).sessions
    mine = client.training.model_id.partition(":train:")[0]
    assert mine in listed, listed
    session = client.rest.get_session(mine).result(timeout=WAIT_S)
    assert client.training.model_id in session.training_run_ids, session


@check
def publish(client: Client) -> None:
    client.rest.publish_checkpoint_from_tinker_path(client.state_path).result(timeout=WAIT_S)
    assert is_public(client)
    client.rest.unpublish_checkpoint_from_tinker_path(client.state_path).result(timeout=WAIT_S)
    assert not is_public(client)


@check
def archive(client: Client) -> None:
    """The weights as an archive, by a URL that needs no key."""
    if not hasattr(client.rest, "get_checkpoint_archive_url_from_tinker_path"):
        raise Absent
    for path in (client.sampler_path, client.state_path):
        answer = client.rest.get_checkpoint_archive_url_from_tinker_path(path).result(timeout=WAIT_S)
        # Up to 0.30 it is in UTC without saying so.
        expires = answer.expires if answer.expires.tzinfo else answer.expires.replace(tzinfo=UTC)
        assert expires.timestamp() > time.time(), answer
        with urllib.request.urlopen(answer.url, timeout=WAIT_S) as response:
            packed = response.read()
        with tarfile.open(fileobj=io.BytesIO(packed)) as files:
            members = files.getnames()
        assert any(name.endswith("adapter_model.safetensors") for name in members), members


@check
def delete(client: Client) -> None:
    client.rest.delete_checkpoint_from_tinker_path(client.state_path).result(timeout=WAIT_S)
    mine = client.rest.list_user_checkpoints().result(timeout=WAIT_S).checkpoints
    assert client.state_path not in [checkpoint.tinker_path for checkpoint in mine]


def new_run(client: Client, *, seed: int = SEED) -> Any:
    return client.service.create_lora_training_client(base_model=client.model, rank=RANK, seed=seed)


def ids(seed: int, num_tokens: int) -> list[int]:
    return [(seed * 31 + j * 7 + j * j % 5) % 900 + 10 for j in range(num_tokens)]


def datums(seed: int, *, num_tokens: int = 16) -> list[types.Datum]:
    """Three datums with weights that float32 holds exactly."""
    found = []
    for i in range(3):
        tokens = ids(seed * 3 + i, num_tokens + 1)
        inputs = {"target_tokens": tokens[1:], "weights": [0.25 * (j % 5) for j in range(num_tokens)]}
        found.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return found


def policy_datums() -> list[types.Datum]:
    found = []
    for i in range(3):
        tokens = ids(40 + i, 13)
        is_sampled = [j >= NUM_PROMPT for j in range(12)]
        inputs = {
            "target_tokens": tokens[1:],
            "logprobs": np.array([-2.0 - 0.1 * j if own else 0.0 for j, own in enumerate(is_sampled)], np.float32),
            "advantages": np.array([(i - 1) * 0.5 if own else 0.0 for own in is_sampled], np.float32),
        }
        found.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return found


def tokens_beyond_the_vocabulary() -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints([1, 2**30]), loss_fn_inputs={"target_tokens": [2, 3]})


def prompt() -> types.ModelInput:
    return types.ModelInput.from_ints(ids(3, 10))


def step_of(run: Any, seed: int) -> str:
    """The loss of a pass, behind which a step was made."""
    loss = loss_of(run.forward_backward(datums(seed), "cross_entropy"))
    run.optim_step(types.AdamParams(learning_rate=2e-3, beta1=0.9, beta2=0.99)).result(timeout=WAIT_S)
    return loss


def samples(sampler: Any, params: types.SamplingParams) -> list[object]:
    answer = sampler.sample(prompt=prompt(), num_samples=2, sampling_params=params).result(timeout=WAIT_S)
    return [[list(sequence.tokens), digest([float32(sequence.logprobs)])] for sequence in answer.sequences]


def is_public(client: Client) -> bool:
    found = client.rest.list_checkpoints(client.training.model_id).result(timeout=WAIT_S).checkpoints
    return next(checkpoint.public for checkpoint in found if checkpoint.tinker_path == client.state_path)


def failure_of(future: Any) -> tinker.RequestFailedError:
    """The failure that a future must end in."""
    try:
        result = future.result(timeout=WAIT_S)
    except tinker.RequestFailedError as error:
        return error
    raise AssertionError(f"no failure, but {str(result)[:200]}")


def loss_of(future: Any) -> str:
    return exact(future.result(timeout=WAIT_S).metrics["loss:sum"])


def logprobs_of(output: types.ForwardBackwardOutput) -> list[np.ndarray]:
    return [float32(fields["logprobs"].to_numpy()) for fields in output.loss_fn_outputs]


def exact(number: float) -> str:
    return float(number).hex()


def float32(values: Iterable[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in np.asarray(values).ravel()], np.float32)


def digest(arrays: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def run_checks(client: Client, checks: dict[str, Callable[[Client], None]]) -> dict[str, object]:
    """The outcome of each check; a failed one does not keep the others from running."""
    outcomes: dict[str, object] = {}
    for name, function in checks.items():
        started = time.monotonic()
        try:
            function(client)
            outcome = {"outcome": "ok"}
        except Absent:
            outcome = {"outcome": "absent"}
        except Exception as error:
            traceback.print_exc()
            outcome = {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        outcomes[name] = {**outcome, "seconds": round(time.monotonic() - started, 2)}
    return {"version": tinker.__version__, "checks": outcomes, "numbers": client.numbers}
