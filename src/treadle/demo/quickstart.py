"""The quickstart of the Tinker documentation through the official SDK, with every claim checked.

The task is theirs ("Getting started with training and sampling"): seven pairs, prompt tokens with weight 0. It knows
the server by its URL only, and refuses to know who started it. Invariant: what is not checked is not claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tinker
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinker import types
from transformers import PreTrainedTokenizerBase

from treadle.config import tinker_api_key
from treadle.demo.report import Plan, Report

# English and pig latin, as in the Tinker documentation's quickstart.
PHRASES = {
    "banana split": "anana-bay plit-say",
    "quantum physics": "uantum-qay ysics-phay",
    "donut shop": "onut-day op-shay",
    "pickle jar": "ickle-pay ar-jay",
    "space exploration": "ace-spay exploration-way",
    "rubber duck": "ubber-ray uck-day",
    "coding wizard": "oding-cay izard-way",
}
UNSEEN_PHRASE = "coffee break"
# Nats per trained token after training. A model that merely knows the shape of the answers stays above 1.
LOSS_BOUND = 0.1
# Phrases that a model may know before training; more, and the demo would prove nothing.
MAX_KNOWN_BEFORE = 1
# The restored run computes the same numbers in the same order; this is room for another kernel choice, no more.
RESTORED_TOLERANCE = 1e-6
# Sampling and training compute the same distribution along different paths (KV cache, batching).
LOGPROB_TOLERANCE = 1e-2
TOPK = 3
RESULT_TIMEOUT_S = 300.0
# What the SDK raises when a server refuses, fails or does not answer.
SDK_ERRORS = (tinker.TinkerError, TimeoutError)


def quickstart(base_url: str, plan: Plan, console: Console, report: Report) -> None:
    """Trains, samples, saves and restores on the server at `base_url`, and adds what it found to `report`."""
    service = tinker.ServiceClient(base_url=base_url, api_key=tinker_api_key(), user_metadata={"purpose": "demo"})
    with service:
        training = service.create_lora_training_client(base_model=plan.model, rank=plan.rank, seed=plan.seed).result(
            timeout=RESULT_TIMEOUT_S
        )
        tokenizer = training.get_tokenizer()
        batch = [make_datum(tokenizer, english, pig_latin) for english, pig_latin in PHRASES.items()]

        before = greedy(service.create_sampling_client(base_model=plan.model).result(), tokenizer, list(PHRASES))
        num_known = sum(before[english] == pig_latin for english, pig_latin in PHRASES.items())
        report.check(num_known <= MAX_KNOWN_BEFORE, f"before training {num_known} of {len(PHRASES)} phrases are right")

        losses = train(training, batch, plan, console)
        report.check(
            losses[-1] < LOSS_BOUND,
            f"the loss per token fell from {losses[0]:.3f} to {losses[-1]:.4f} (bound {LOSS_BOUND})",
        )
        sampling = training.save_weights_and_get_sampling_client().result(timeout=RESULT_TIMEOUT_S)
        after = greedy(sampling, tokenizer, [*PHRASES, UNSEEN_PHRASE])
        num_right = sum(after[english] == pig_latin for english, pig_latin in PHRASES.items())
        report.check(num_right == len(PHRASES), f"after training {num_right} of {len(PHRASES)} phrases are right")
        show_phrases(before, after, console)

        check_logprobs(sampling, training, tokenizer, batch, console, report)
        check_restore(service, training, batch, report)


def make_datum(tokenizer: PreTrainedTokenizerBase, english: str, pig_latin: str) -> types.Datum:
    """One example: the model reads the prompt and is trained on the completion; targets are shifted by one."""
    prompt = encode_prompt(tokenizer, english)
    completion = tokenizer.encode(f" {pig_latin}\n\n", add_special_tokens=False)
    tokens = prompt + completion
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(weights)]),
            "weights": types.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
        },
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, english: str) -> list[int]:
    """The tokens of the question."""
    return list(tokenizer.encode(f"English: {english}\nPig Latin:"))


def train(training: tinker.TrainingClient, batch: Sequence[types.Datum], plan: Plan, console: Console) -> list[float]:
    """Loss per trained token of every step, before its update. Pass and step are sent together, as the docs advise."""
    adam = types.AdamParams(learning_rate=plan.learning_rate)
    losses: list[float] = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("training", total=plan.steps, loss="")
        for step in range(plan.steps):
            passed = training.forward_backward(list(batch), "cross_entropy")
            stepped = training.optim_step(adam)
            losses.append(loss_per_token(passed.result(timeout=RESULT_TIMEOUT_S), batch))
            stepped.result(timeout=RESULT_TIMEOUT_S)
            progress.update(task, advance=1, loss=f"loss {losses[-1]:.4f}")
            # A log file gets a few lines; a terminal has the bar.
            if not console.is_terminal and step % 10 == 9:
                console.print(f"step {step + 1:3d}: loss per token {losses[-1]:.4f}", highlight=False)
    return losses


def loss_per_token(output: types.ForwardBackwardOutput, batch: Sequence[types.Datum]) -> float:
    """The summed loss over the summed weights."""
    num_trained = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in batch)
    return float(output.metrics["loss:sum"] / num_trained)


def greedy(
    sampling: tinker.SamplingClient, tokenizer: PreTrainedTokenizerBase, phrases: Sequence[str]
) -> dict[str, str]:
    """The most likely first line for every phrase; all requests are sent at once."""
    params = types.SamplingParams(max_tokens=32, temperature=0.0, stop=["\n"])
    futures = {
        english: sampling.sample(types.ModelInput.from_ints(encode_prompt(tokenizer, english)), 1, params)
        for english in phrases
    }
    answers = {english: future.result(timeout=RESULT_TIMEOUT_S) for english, future in futures.items()}
    return {english: str(tokenizer.decode(answer.sequences[0].tokens)).strip() for english, answer in answers.items()}


def check_logprobs(
    sampling: tinker.SamplingClient,
    training: tinker.TrainingClient,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[types.Datum],
    console: Console,
    report: Report,
) -> None:
    """Sampler and trainer agree on the logprobs of one datum, and the best of the top-k is the trained token."""
    datum = batch[0]
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].data[-1])]
    sampled = sampling.compute_logprobs(types.ModelInput.from_ints(tokens)).result(timeout=RESULT_TIMEOUT_S)
    forward = training.forward([datum], "cross_entropy").result(timeout=RESULT_TIMEOUT_S)
    trained = forward.loss_fn_outputs[0]["logprobs"].data
    gaps = [abs(ours - theirs) for ours, theirs in zip(sampled[1:], trained, strict=True) if ours is not None]
    worst = max(gaps) if len(gaps) == len(tokens) - 1 and all(map(math.isfinite, gaps)) else math.inf
    report.check(
        sampled[0] is None and worst < LOGPROB_TOLERANCE,
        f"sampler and trainer agree on {len(gaps)} logprobs (largest difference {worst:.1e})",
    )
    answer = sampling.sample(
        types.ModelInput.from_ints(tokens),
        1,
        types.SamplingParams(max_tokens=1, temperature=0.0),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=TOPK,
    ).result(timeout=RESULT_TIMEOUT_S)
    rows = answer.topk_prompt_logprobs or []
    first = [weight > 0 for weight in datum.loss_fn_inputs["weights"].data].index(True) + 1
    table = Table("token", f"the {TOPK} most likely there", title="Top-k prompt logprobs")
    for token, row in list(zip(tokens, rows, strict=False))[first : first + 5]:
        likely = "  ".join(f"{tokenizer.decode([other])!r} {logprob:.3f}" for other, logprob in row or [])
        table.add_row(escape(repr(tokenizer.decode([token]))), escape(likely))
    console.print(table)
    best = [row[0][0] for row in rows[first:] if row]
    report.check(
        len(rows) == len(tokens) and best == tokens[first:], "the most likely prompt tokens are the trained ones"
    )


def check_restore(
    service: tinker.ServiceClient, training: tinker.TrainingClient, batch: Sequence[types.Datum], report: Report
) -> None:
    """A run restored from a checkpoint has the loss of the run that was saved."""
    path = training.save_state("demo").result(timeout=RESULT_TIMEOUT_S).path
    saved = training.forward(list(batch), "cross_entropy").result(timeout=RESULT_TIMEOUT_S)
    restored = service.create_training_client_from_state_with_optimizer(path).result(timeout=RESULT_TIMEOUT_S)
    again = restored.forward(list(batch), "cross_entropy").result(timeout=RESULT_TIMEOUT_S)
    ours, theirs = loss_per_token(saved, batch), loss_per_token(again, batch)
    report.check(
        math.isclose(ours, theirs, rel_tol=RESTORED_TOLERANCE),
        f"the run restored from {path} has the same loss ({ours:.8f} and {theirs:.8f})",
    )


def show_phrases(before: dict[str, str], after: dict[str, str], console: Console) -> None:
    """What the model said before and after, beside what it was taught."""
    table = Table("English", "before", "after", "taught", title="Greedy samples")
    for english in PHRASES:
        is_right = after[english] == PHRASES[english]
        style = "green" if is_right else "red"
        table.add_row(english, escape(before[english]), f"[{style}]{escape(after[english])}[/]", PHRASES[english])
    table.add_row(UNSEEN_PHRASE, "", escape(after[UNSEEN_PHRASE]), "(never seen)")
    console.print(table)
