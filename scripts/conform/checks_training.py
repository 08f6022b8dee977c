"""ServiceClient and TrainingClient: sessions, runs, passes, steps, saves, loads, custom losses."""

from __future__ import annotations

import math
from urllib.request import urlopen

import numpy as np
import tinker
import torch
from safetensors.numpy import load as load_safetensors
from tinker import types

from conform.registry import Call, method
from conform.world import ADAM, MODEL, World, datum, logprobs, prompt, train


@method("ServiceClient.create_lora_training_client")
def create_run(world: World, call: Call) -> str:
    run = call(world.service, "create_lora_training_client", MODEL, rank=5, seed=1, user_metadata={"a": "b"})
    info = run.get_info()
    assert (info.lora_rank, info.model_data.model_name) == (5, MODEL), info
    listed = world.rest.get_training_run(run.model_id).result()
    assert listed.user_metadata == {"a": "b"}, listed
    return f"get_info: rank {info.lora_rank}, model {MODEL}; the run is listed with its metadata"


@method("ServiceClient.create_training_client_from_state")
def create_from_state(world: World, call: Call) -> str:
    run = call(world.service, "create_training_client_from_state", world.saved)
    assert logprobs(run) == logprobs(world.run)
    return "logprobs equal to those of the saved run, to the bit"


@method("ServiceClient.create_training_client_from_state_with_optimizer")
def create_from_state_with_optimizer(world: World, call: Call) -> str:
    run = call(world.service, "create_training_client_from_state_with_optimizer", world.saved)
    plain = world.service.create_training_client_from_state(world.saved).result()
    undisturbed = world.new_run()
    train(undisturbed, 2)
    train(run)
    train(plain)
    assert logprobs(run) == logprobs(undisturbed) != logprobs(plain)
    return "its next step equals that of an undisturbed run, to the bit; without the moments it does not"


@method("ServiceClient.create_sampling_client", "TrainingClient.create_sampling_client")
def create_sampler(world: World, call: Call) -> str:
    sampler = call(world.service, "create_sampling_client", model_path=world.sampler_path)
    of_run = call(world.run, "create_sampling_client", world.sampler_path)
    want = logprobs(world.run)
    for one in (sampler, of_run):
        np.testing.assert_allclose(one.compute_logprobs(prompt()).result()[1:], want, atol=2e-5)
    return "compute_logprobs equals the run's forward"


@method("ServiceClient.create_rest_client")
def create_rest(world: World, call: Call) -> str:
    run_id = world.run.model_id
    assert world.service.create_rest_client().get_training_run(run_id).result().training_run_id == run_id
    return "reads a run of this user"


@method("ServiceClient.get_server_capabilities", "RestClient.get_server_capabilities")
def capabilities(world: World, call: Call) -> str:
    for owner in (world.service, world.rest):
        if hasattr(owner, "get_server_capabilities_async") or call.__name__ == "_call":
            models = call(owner, "get_server_capabilities").supported_models
            served = next(one for one in models if one.model_name == MODEL)
            assert served.max_context_length
            assert served.trainable
            assert served.sampleable
    return f"{MODEL}, trainable and sampleable, context {served.max_context_length}"


@method("ServiceClient.copy_weights")
def copy_weights(world: World, call: Call) -> str:
    service = world.new_service(project_id=world.name())
    return _copied(world, call(service, "copy_weights", world.saved))


@method("RestClient.copy_weights")
def copy_weights_to_project(world: World, call: Call) -> str:
    project = world.name()
    copy = call(world.rest, "copy_weights", world.saved, project, ttl_seconds=7200)
    listed = world.rest.list_training_runs(project_id=project).result().training_runs
    assert [run.training_run_id in copy for run in listed] == [True]
    return _copied(world, copy)


def _copied(world: World, copy: str) -> str:
    run = world.service.create_training_client_from_state(copy).result()
    assert copy != world.saved
    assert logprobs(run) == logprobs(world.run)
    return "a run made from the copy has the same logprobs; the copy is the project's"


@method("ServiceClient.close")
def close(world: World, call: Call) -> str:
    service = world.new_service()
    run = service.create_lora_training_client(MODEL, rank=2).result()
    session_id = world.session_of(run)
    service.close("errored", "on purpose").result(timeout=30)
    found = world.rest.search_sessions(types.SessionSearchRequest(session_id=session_id)).result().sessions[0]
    assert (found.status.type, found.status.reason.type, found.status.detail) == (
        "client_finished",
        "errored",
        "on purpose",
    )
    return "the session is found as finished, with reason and detail"


@method("ServiceClient.create_custom_loss")
def create_custom_loss(world: World, call: Call) -> str:
    handle = world.service.create_custom_loss(_weighted, {"logprobs": 1, "weights": 1}).result()
    mine, usual = world.new_run(), world.new_run()
    data = datum()
    mine.forward_backward_custom([data], handle).result()
    usual.forward_backward([data], "cross_entropy").result()
    for run in (mine, usual):
        run.optim_step(ADAM).result()
    np.testing.assert_allclose(logprobs(mine), logprobs(usual), atol=1e-6)
    return "a traced cross-entropy trains like the built-in one"


def _weighted(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/own:sum": loss}


@method("ServiceClient.get_telemetry", "TrainingClient.get_telemetry", "SamplingClient.get_telemetry")
@method("RestClient.get_telemetry", "AdminClient.get_telemetry")
def telemetry(world: World, call: Call) -> str:
    telemetry = world.service.get_telemetry()
    assert telemetry is not None
    assert telemetry.log("conformance")
    return "the client has telemetry, and the server takes its events"


@method("ServiceClient.get_console_url", "TrainingClient.get_console_url")
def console_url(world: World, call: Call) -> str:
    assert world.session_of(world.run) in world.run.get_console_url()
    return "made by the client, of the vendor's website; the server has no part in it"


@method("ServiceClient.holder")
def holder(world: World, call: Call) -> str:
    assert world.service.holder.get_session_id()
    return "the client's own state, with the session that the server made"


@method("TrainingClient.forward")
def forward(world: World, call: Call) -> str:
    run = world.new_run()
    before = logprobs(run)
    output = call(run, "forward", [datum()], "cross_entropy")
    assert math.isclose(output.metrics["loss:sum"], -sum(before), rel_tol=1e-5)
    try:
        run.optim_step(ADAM).result()
    except tinker.RequestFailedError:
        return "loss:sum is minus the sum of the logprobs; no gradient was left"
    raise AssertionError("forward left a gradient")


@method("TrainingClient.forward_backward")
def forward_backward(world: World, call: Call) -> str:
    run = world.new_run()
    before = sum(logprobs(run))
    call(run, "forward_backward", [datum()], "cross_entropy")
    run.optim_step(ADAM).result()
    assert sum(logprobs(run)) > before
    return "the next step raises the targets' logprobs"


@method("TrainingClient.forward_backward_custom")
def forward_backward_custom(world: World, call: Call) -> str:
    mine, usual = world.new_run(), world.new_run()

    def loss(data: list[types.Datum], values: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = -torch.stack([value.sum() for value in values]).sum()
        return total, {"own": 1.0}

    output = call(mine, "forward_backward_custom", [datum()], loss)
    usual.forward_backward([datum()], "cross_entropy").result()
    for run in (mine, usual):
        run.optim_step(ADAM).result()
    assert output.metrics["own"] == 1.0
    np.testing.assert_allclose(logprobs(mine), logprobs(usual), atol=1e-6)
    return "a loss of the client's own trains like the built-in one that it equals"


@method("TrainingClient.optim_step")
def optim_step(world: World, call: Call) -> str:
    run = world.new_run()
    before = logprobs(run)
    run.forward_backward([datum()], "cross_entropy").result()
    metrics = call(run, "optim_step", ADAM).metrics
    assert logprobs(run) != before
    return f"weights changed; metrics: {', '.join(sorted(metrics))}"


@method("TrainingClient.get_info")
def get_info(world: World, call: Call) -> str:
    info = call(world.run, "get_info")
    assert (info.model_id, info.lora_rank, info.is_lora) == (world.run.model_id, 4, True)
    return "the run's id, rank and base model"


@method("TrainingClient.get_tokenizer")
def training_tokenizer(world: World, call: Call) -> str:
    tokenizer = world.run.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("2 + 3 =")) == "2 + 3 ="
    return "text survives encoding and decoding"


@method("TrainingClient.save_state")
def save_state(world: World, call: Call) -> str:
    name = world.name()
    path = call(world.run, "save_state", name, ttl_seconds=7200, user_metadata={"k": "v"}).path
    listed = {one.tinker_path: one for one in world.rest.list_checkpoints(world.run.model_id).result().checkpoints}
    assert listed[path].expires_at is not None
    assert listed[path].user_metadata == {"k": "v"}
    again = world.run.save_state(name, overwrite=True).result().path
    assert again == path
    return "listed with its time to live and metadata; overwrite replaces it"


@method("TrainingClient.load_state")
def load_state(world: World, call: Call) -> str:
    run = world.new_run(seed=8)
    call(run, "load_state", world.saved)
    assert logprobs(run) == logprobs(world.run)
    return "logprobs equal to those of the saved run, to the bit"


@method("TrainingClient.load_state_with_optimizer")
def load_state_with_optimizer(world: World, call: Call) -> str:
    run, undisturbed = world.new_run(seed=8), world.new_run()
    call(run, "load_state_with_optimizer", world.saved)
    train(run)
    train(undisturbed, 2)
    assert logprobs(run) == logprobs(undisturbed)
    return "its next step equals that of an undisturbed run, to the bit"


@method("TrainingClient.save_weights_for_sampler")
def save_for_sampler(world: World, call: Call) -> str:
    path = call(world.run, "save_weights_for_sampler", world.name()).path
    sampler = world.service.create_sampling_client(model_path=path).result()
    np.testing.assert_allclose(sampler.compute_logprobs(prompt()).result()[1:], logprobs(world.run), atol=2e-5)
    return "a sampler of that path has the run's logprobs"


@method("TrainingClient.save_weights_and_get_sampling_client")
def save_and_sample(world: World, call: Call) -> str:
    run = world.new_run()
    frozen = call(run, "save_weights_and_get_sampling_client")
    inflight = call(run, "save_weights_and_get_sampling_client", kind="inflight")
    before = logprobs(run)
    train(run)
    call(run, "save_weights_and_get_sampling_client", kind="inflight")
    np.testing.assert_allclose(frozen.compute_logprobs(prompt()).result()[1:], before, atol=2e-5)
    np.testing.assert_allclose(inflight.compute_logprobs(prompt()).result()[1:], logprobs(run), atol=2e-5)
    return "a snapshot keeps its weights, an inflight client takes those of a later save"


@method("TrainingClient.save_weights_external")
def save_external(world: World, call: Call) -> str:
    saved = call(world.run, "save_weights_external", world.name(), ttl_seconds=3600)
    urls = world.rest.get_external_weights_urls(saved.path).result().urls
    with urlopen(urls["adapter_model.safetensors"]) as file:
        tensors = load_safetensors(file.read())
    assert any(name.endswith("lora_A.weight") for name in tensors)
    assert "adapter_config.json" in urls
    return f"{len(tensors)} tensors of a PEFT adapter, read through the signed URLs"
