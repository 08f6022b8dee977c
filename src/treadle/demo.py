"""The quickstart, end to end, through the official SDK: teach a model seven phrases of pig latin and check everything.

It is a client: it knows the server by its URL only, and starts one as a process of its own when none is given. The task
is the quickstart of the Tinker documentation ("Getting started with training and sampling"): seven pairs, prompt tokens
with weight 0. Invariant: the exit status is 0 only when every check of `Report` passed, and nothing is left running.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import tinker
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinker import types

from treadle.config import BUNDLED_MODEL, bypass_proxy_for, environment_for_child, tinker_api_key
from treadle.errors import ServerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
READY_PREFIX = "treadle ready: "


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train. The defaults fit the bundled model."""

    model: str = BUNDLED_MODEL
    steps: int = 40
    learning_rate: float = 6e-3
    rank: int = 32
    seed: int = 0


@dataclass(slots=True)
class Report:
    """What was checked, in words, and what failed."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def check(self, is_right: bool, claim: str) -> None:
        (self.passed if is_right else self.failed).append(claim)


def run_demo(*, url: str | None, plan: Plan) -> int:
    """The exit status of the demo: 0 when every check passed. url None starts a server and stops it at the end."""
    console, report, started = Console(), Report(), time.monotonic()
    with own_server(plan.model, console, report) if url is None else nullcontext(url) as base_url:
        bypass_proxy_for(urlsplit(base_url).hostname or "127.0.0.1")
        try:
            quickstart(base_url, plan, console, report)
        except (tinker.TinkerError, TimeoutError) as error:
            report.check(False, f"the SDK failed: {error or type(error).__name__}")
    for claim in report.passed:
        console.print(f"[green]ok[/]   {escape(claim)}", highlight=False)
    for claim in report.failed:
        console.print(f"[bold red]FAIL[/] {escape(claim)}", highlight=False)
    console.print(f"{time.monotonic() - started:.1f} s", style="dim")
    return 1 if report.failed else 0


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


@contextmanager
def own_server(model: str, console: Console, report: Report) -> Iterator[str]:
    """The URL of a server started for this block, on a free port and an empty data directory.

    Stopped with SIGTERM at the end; that it drains and exits with 0 is one of the checks. Raises ServerError, with the
    end of its log, when it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="treadle-demo-") as scratch:
        log_path = Path(scratch) / "server.log"
        arguments = ["serve", "--port", "0", "--data", str(Path(scratch) / "data"), "--model", model]
        with log_path.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "treadle.cli", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment_for_child(),
            )
        try:
            base_url = _wait_until_ready(process, log_path)
            console.print(f"server at {base_url}", style="dim", highlight=False)
            yield base_url
        finally:
            status = _stop(process)
        report.check(status == 0, f"the server stopped on SIGTERM with exit status {status}")
        if report.failed:
            console.print("[bold]the end of the server's log:[/]\n" + escape(_tail(log_path)), highlight=False)


def _wait_until_ready(process: subprocess.Popen[str], log_path: Path) -> str:
    """The URL that the server prints, once /readyz answers 200."""
    assert process.stdout is not None
    # The line comes, or the pipe closes because the process ended: either way this does not hang.
    line = next((text for text in process.stdout if text.startswith(READY_PREFIX)), None)
    if line is None:
        raise ServerError(f"the server did not start:\n{_tail(log_path)}")
    base_url = line.removeprefix(READY_PREFIX).strip()
    bypass_proxy_for(urlsplit(base_url).hostname or "127.0.0.1")
    deadline = time.monotonic() + START_TIMEOUT_S
    while httpx.get(f"{base_url}/readyz", timeout=10.0).status_code != 200:
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"the server did not become ready:\n{_tail(log_path)}")
        time.sleep(0.1)
    return base_url


def _stop(process: subprocess.Popen[str]) -> int:
    """The exit status after SIGTERM; after a bounded wait SIGKILL, so that nothing is left behind."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
    return process.returncode


def _tail(path: Path, num_lines: int = 30) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])
