"""Files that are losses become the graphs that the SDK would have traced; others are refused with line and reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treadle.domain.custom_loss import check_custom_loss
from treadle.review.tracing import UntraceableError, trace_file

HEAD = 'import torch\nINPUTS = {"logprobs": 1, "advantages": 1}\ndef loss(logprobs, advantages):\n'


def refusal(source: str) -> str:
    with pytest.raises(UntraceableError) as raised:
        trace_file(source, "mine")
    return str(raised.value)


def in_loss(body: str) -> str:
    """The refusal of a loss that does this, which stands in line 4 and behind it."""
    return refusal(HEAD + "\n".join(f"    {line}" for line in body.splitlines()))


def test_a_file_becomes_the_graph_that_the_sdk_traces() -> None:
    from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

    from treadle.wire.graphs import CreateCustomLossBody, custom_loss_of

    source = '''
"""A loss."""
from __future__ import annotations
import math
import torch
import torch.nn.functional as F

LOW = 0.8
INPUTS = {"logprobs": 1, "old_logprobs": 1, "advantages": 1}

def clipped(ratio: torch.Tensor) -> torch.Tensor:
    return torch.clamp(ratio, LOW, math.inf)

def loss(logprobs, old_logprobs, advantages):
    ratio = torch.exp(logprobs - old_logprobs)[..., None].squeeze(-1)
    kept = torch.minimum(ratio * advantages, clipped(ratio) * advantages.to(dtype=torch.float32))
    spread = F.softplus(kept).sum() / math.sqrt(logprobs.shape[0])
    return -kept.sum() + spread, {"custom/ratio:mean": ratio.mean()}
'''
    ours = trace_file(source, "clipped")
    check_custom_loss(ours)
    module: dict[str, object] = {}
    exec(source, module)
    handle = trace_loss(module["loss"], module["INPUTS"], "session")  # type: ignore[arg-type]
    body = {
        "session_id": "session",
        "custom_loss_seq_id": 0,
        "name": "clipped",
        "inputs": [given.model_dump() for given in handle.inputs],
        "graph": encode_graph(handle).model_dump(),
    }
    theirs = custom_loss_of(CreateCustomLossBody.model_validate(body))
    assert [(node.op, node.name, node.args, node.kwargs) for node in ours.nodes] == [
        (node.op, node.name, node.args, node.kwargs) for node in theirs.nodes
    ]
    assert ours.inputs == theirs.inputs


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("x = 1\nif logprobs.sum() > 0: x = 2", "line 5: TraceError: symbolically traced variables cannot be used"),
        ("for x in logprobs: pass", "line 4: TraceError: Proxy object cannot be iterated"),
        ("return torch.randn_like(logprobs).sum(), {}", "line 4: torch.randn_like is not an operation"),
        ("return logprobs.exp_().sum(), {}", r"line 4: .exp_() is not an operation"),
        ("return logprobs.sum().item(), {}", r"line 4: .item() is not an operation"),
        ("return (logprobs * torch.ones(3)).sum(), {}", "line 4: a tensor that was made outside"),
        ("for _ in range(600): logprobs = logprobs + 1\nreturn logprobs", "line 4: the graph has over 512 nodes"),
        ("import os", "line 4: import of 'os'; a loss file imports no more than"),
        ("from torch.multiprocessing import Pool", "line 4: import of 'torch.multiprocessing'"),
        ("open('/etc/passwd')", "line 4: open() is not there for a loss file"),
        ("eval('1')", "line 4: eval() is not there"),
        ("print(1)", "line 4: print() is not there"),
        ("raise SystemExit(0)", "line 4: SystemExit: 0"),
        ("def f(): return f()\nf()", "line 4: RecursionError"),
        ("class E(BaseException):\n    def __str__(self): raise SystemExit\nraise E", "line 6: E: "),
        ("return logprobs.sum() + unknown, {}", "line 4: NameError: name 'unknown'"),
        ("return logprobs.sum(), {'custom/a:mean': object()}", "NotImplementedError"),
        ("return (logprobs * 2**63).sum(), {}", "takes an integer that does not fit into 64 bits"),
        # A graph has none of this, so it would be another loss than the file's.
        ("with torch.no_grad(): x = logprobs.exp()", "line 4: torch.no_grad() and torch.autograd.Function are not"),
        ("with torch.inference_mode(): x = logprobs.exp()", "line 4: torch.no_grad()"),
        (
            "class F(torch.autograd.Function):\n"
            "    @staticmethod\n"
            "    def forward(ctx, x): return x * 2\n"
            "F.apply(logprobs)",
            "line 6: torch.no_grad() and torch.autograd.Function are not recorded",
        ),
        ("with torch.autocast('cpu'): x = logprobs.exp()", "line 4: torch.autocast is not recorded"),
        ("logprobs.requires_grad = False", "line 4: .requires_grad of a tensor is set"),
    ],
)
def test_what_cannot_be_traced_is_refused_where_it_stands(body: str, reason: str) -> None:
    assert reason in in_loss(body)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def loss(logprobs:", "line 1: SyntaxError"),
        ("(" * 3_000, "line 1: "),
        ("\0", "null bytes"),
        ("x = 1", "the file defines no function 'loss'"),
        ("class L:\n  def __call__(self, logprobs): ...\nloss = L()", "the file defines no function 'loss'"),
        ("loss = len", "the file defines no function 'loss'"),
        ("def __getattr__(name): return name", "the file defines no function 'loss'"),
        ("def loss(logprobs): ...", "INPUTS must be a dictionary with the rank of each parameter"),
        ("INPUTS = {'logprobs': 1}\ndef loss(logprobs, extra): ...", "INPUTS = {'logprobs': 1, 'extra': 1}"),
        ("INPUTS = {'logprobs': '1'}\ndef loss(logprobs): ...", "INPUTS['logprobs'] is not 0, 1 or 2"),
        ("INPUTS = {}\ndef loss(*rest): ...", "plain parameters without defaults"),
        ("INPUTS = {}\ndef loss(logprobs, x=1): ...", "plain parameters without defaults"),
        ("INPUTS = {}\ndef loss(advantages): ...", "the first parameter of loss() is logprobs"),
        ("raise KeyboardInterrupt", "line 1: KeyboardInterrupt"),
    ],
)
def test_a_file_of_another_form_is_refused(source: str, reason: str) -> None:
    assert reason in refusal(source)


def test_the_file_is_executed_once(tmp_path: Path) -> None:
    """It leaves a mark here, where nothing confines it."""
    mark = tmp_path / "mark"
    source = HEAD.replace("INPUTS", f"torch.os.close(torch.os.open({str(mark)!r}, 0o2102))\nINPUTS") + (
        "    return (logprobs * advantages).sum(), {}\n"
    )
    assert trace_file(source, "mine").nodes
    assert mark.exists()
    assert torch.is_grad_enabled()
