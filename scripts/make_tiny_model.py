"""Make the bundled tiny model: text, tokenizer, weights and the files that describe them.

Trains a byte-level BPE tokenizer and a small Qwen3 model from scratch on the text of `tiny_corpus`, on two CPU
threads with fixed seeds, prints the loss and a little evaluation, and writes one directory. It downloads nothing.
It does not promise the same bytes on another kind of processor: floating-point sums may be ordered differently.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiny_corpus

# Threads that sleep at barriers rather than spin: on a shared machine spinning makes a step many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 1280  # A multiple of 64, filled exactly: no padding rows.
ROW_TOKENS = 256
BATCH_ROWS = 24
DEFAULT_STEPS = 800
THREADS = 2
UNGRADED_WEIGHT = 0.1
# Small matrices make a low-rank adapter's first steps count for more.
MATRIX_DECAY = 0.3

# Words keep the space before them, digits and line breaks stand alone so that numbers and blank lines always split
# the same way.
PRE_TOKEN_PATTERN = r" ?\p{L}+|\p{N}|\n| ?[^\s\p{L}\p{N}]+|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the whole byte alphabet, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(tiny_corpus.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=tiny_corpus.TURN_END,
        pad_token=tiny_corpus.END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def pack_rows(
    documents: Sequence[tiny_corpus.Document], tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows and their per-token loss weights.

    Every row starts with a document, as a prompt does when the model is used; the last document of a row is cut.
    """
    segments = [segment for document in documents for segment in document]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast([segment.text for segment in segments])
    encoded = iter(encoding.ids for encoding in encodings)
    rows: list[list[int]] = []
    weights: list[list[float]] = []
    row: list[int] = []
    weight: list[float] = []
    for document in documents:
        for segment in document:
            ids = next(encoded)
            row += ids
            weight += [1.0 if segment.graded else UNGRADED_WEIGHT] * len(ids)
        if len(row) > ROW_TOKENS:
            rows.append(row[: ROW_TOKENS + 1])
            weights.append(weight[: ROW_TOKENS + 1])
            row, weight = [], []
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return torch.tensor([rows[i] for i in order]), torch.tensor([weights[i] for i in order])


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The untrained model; its shape is what two CPU cores can train in minutes."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_dropout=0.0,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, tiny_corpus.TURN_END),
        pad_token_id=token_id(tokenizer, tiny_corpus.END_OF_TEXT),
    )
    return Qwen3ForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is pushed towards an orthogonal matrix, for the weight matrices inside the layers.

    Written out because the one in torch computes in bfloat16, which is slow on processors without it.
    """

    def __init__(
        self, params: Sequence[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are orthogonalized together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                updates = []
                for param in params:
                    assert param.grad is not None
                    state = self.state[param]
                    buffer = state.setdefault("momentum", torch.zeros_like(param))
                    buffer.lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(buffer, group["momentum"]))
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for param, update in zip(params, _orthogonal(torch.stack(updates)), strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def _orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Roughly the nearest orthogonal matrices, by a quintic iteration that drives singular values towards one."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x: torch.Tensor = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def rate_at(step: int, steps: int) -> float:
    """The share of the peak learning rate: a short rise, a flat part, a fall over the last half."""
    warm_up = max(1, steps // 50)
    return min(1.0, (step + 1) / warm_up, 2.0 * (steps - step) / steps)


def batches(rows: torch.Tensor, weights: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in order, starting again at the end of the rows."""
    start = 0
    while True:
        if start + BATCH_ROWS > len(rows):
            start = 0
        yield rows[start : start + BATCH_ROWS], weights[start : start + BATCH_ROWS]
        start += BATCH_ROWS


def train(
    model: Qwen3ForCausalLM, rows: torch.Tensor, weights: torch.Tensor, steps: int, matrix_rate: float, rate: float
) -> None:
    """Train in place and print the weighted loss per token now and then."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(inner, lr=matrix_rate, weight_decay=MATRIX_DECAY),
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [matrix_rate, rate]
    began = time.monotonic()
    source = batches(rows, weights)
    recent: list[float] = []
    for step in range(steps):
        ids, weight = next(source)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        share = weight[:, 1:].flatten()
        loss = (losses * share).sum() / share.sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_at(step, steps)
            optimizer.step()
        graded = share == 1.0
        recent.append(losses.detach()[graded].mean().item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = sum(recent) / len(recent)
            print(f"step {step + 1:5d}  loss on answers {mean:.4f}  {time.monotonic() - began:6.1f} s", flush=True)
            recent.clear()


@torch.no_grad()
def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], limit: int
) -> list[str]:
    """Greedy completions, cut after the first end token; prompts of one length go together, so none is padded."""
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for place, ids in enumerate(tokenizer(list(prompts), add_special_tokens=False)["input_ids"]):
        by_length.setdefault(len(ids), []).append((place, ids))
    ends = [token_id(tokenizer, token) for token in (tiny_corpus.TURN_END, tiny_corpus.END_OF_TEXT)]
    outputs = [""] * len(prompts)
    for group in by_length.values():
        ids = torch.tensor([ids for _, ids in group])
        made: list[torch.Tensor] = []
        cache = None
        ended = torch.zeros_like(ids[:, :1], dtype=torch.bool)
        for _ in range(limit):
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            ids = result.logits[:, -1:].argmax(-1)
            made.append(ids)
            ended |= (ids == ends[0]) | (ids == ends[1])
            if bool(ended.all()):
                break
        for (place, _), row in zip(group, torch.cat(made, 1).tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            outputs[place] = str(tokenizer.decode(row[:end]))
    return outputs


def evaluate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 50) -> None:
    """Print, for every task, the share of exact answers as chat (end token included) and after a plain label."""
    model.train(False)
    rng = random.Random("evaluation")
    for name, task in tiny_corpus.TASK_BY_NAME.items():
        examples = [task(rng) for _ in range(count)]
        chats = [tiny_corpus.chat_turn("user", example.question) + "<|im_start|>assistant\n" for example in examples]
        lines = [f"{example.label}: {example.given}\nAnswer:" for example in examples]
        chat_right = [
            text == example.answer + tiny_corpus.TURN_END
            for text, example in zip(complete(model, tokenizer, chats, 32), examples, strict=True)
        ]
        line_right = [
            text.split("\n")[0] == f" {example.answer}" and "\n" in text
            for text, example in zip(complete(model, tokenizer, lines, 32), examples, strict=True)
        ]
        print(f"{name:16s} chat {sum(chat_right) / count:4.0%}  plain {sum(line_right) / count:4.0%}", flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the weights in bfloat16 with the tokenizer and the configuration files."""
    out.mkdir(parents=True, exist_ok=True)
    ends = [token_id(tokenizer, token) for token in (tiny_corpus.TURN_END, tiny_corpus.END_OF_TEXT)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1], do_sample=True)  # type: ignore[no-untyped-call]
    model.bfloat16()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The weights come out readable by their owner alone; everything here is to be packaged.
    (out / "model.safetensors").chmod(0o644)
    # A class name that older and newer releases of transformers both resolve to the plain tokenizer.json loader.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    torch.nn.Module.float(model)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default_out = Path(__file__).resolve().parent.parent / "src" / "treadle" / "bundled" / "tiny"
    parser.add_argument("--out", type=Path, default=default_out)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--rate", type=float, default=0.005)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    began = time.monotonic()
    documents = list(tiny_corpus.documents(arguments.seed))
    tokenizer = train_tokenizer([tiny_corpus.text_of(document) for document in documents[:10_000]])
    rows, weights = pack_rows(documents, tokenizer, arguments.seed)
    model = new_model(tokenizer)
    size = sum(param.numel() for param in model.parameters())
    print(f"{rows.numel()} tokens in {len(rows)} rows, {size} parameters, {time.monotonic() - began:.1f} s", flush=True)
    train(model, rows, weights, arguments.steps, arguments.matrix_rate, arguments.rate)
    save(model, tokenizer, arguments.out)
    # What is evaluated is what was written: the weights rounded to bfloat16.
    evaluate(model, tokenizer)
    print(f"wrote {arguments.out} in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
