"""The engine runs where the server's packages are not installed: on a GPU box with torch and transformers alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

# None in sys.modules is how Python says "not installed", to `import` and to whoever looks with find_spec.
ABSENT = """
    import sys

    for name in (
        "aiosqlite alembic anyio click fastapi grpc httptools httpx jaxtyping msgspec opentelemetry orjson peft "
        "prometheus_client pydantic pydantic_settings ray rich sqlalchemy starlette structlog tinker typer uvicorn "
        "uvloop vllm"
    ).split():
        sys.modules[name] = None
"""

ONE_STEP = """
    import importlib
    import pkgutil

    import numpy as np

    import treadle.engine
    from treadle.domain.losses import resolve_loss
    from treadle.domain.ops import AdamParams, Datum, LoraSpec
    from treadle.engine.base_model import load_base_model
    from treadle.engine.files import encode_state, export_peft
    from treadle.engine.memory import measure_pass_cost, pass_limits
    from treadle.engine.optim import adamw_step
    from treadle.engine.passes import QuantumInput, run_micro_batch
    from treadle.engine.state import commit_scratch, new_training_state

    for module in pkgutil.walk_packages(treadle.engine.__path__, "treadle.engine."):
        importlib.import_module(module.name)
    base = load_base_model(sys.argv[1], name="local/tiny", device="cpu", dtype="float32", num_threads=1)
    assert pass_limits(base, measure_pass_cost(base)).full > 0
    state = new_training_state(base, LoraSpec(rank=4, seed=0))
    datum = Datum(tokens=np.arange(9, dtype=np.int32), inputs={"target_tokens": np.arange(9)})
    scratch = state.new_scratch()
    (result,) = run_micro_batch(base, [QuantumInput(state, [datum], resolve_loss("cross_entropy", {}), scratch)])
    assert result.failure is None
    commit_scratch(state, scratch)
    adamw_step(state, AdamParams(learning_rate=1e-3))
    assert export_peft(encode_state(state, base, with_optimizer=True, applied_seq=1))
    ours = {name.split(".")[1] for name in sys.modules if name.startswith("treadle.")}
    print("trained with", *sorted(ours))
"""


def test_engine_trains_where_the_servers_packages_are_absent(model_dir: Path) -> None:
    script = textwrap.dedent(ABSENT) + textwrap.dedent(ONE_STEP)
    done = subprocess.run(
        [sys.executable, "-c", script, str(model_dir)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained with domain engine errors masking"
