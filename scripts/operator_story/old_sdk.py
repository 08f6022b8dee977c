"""One pass with a named loss, by an SDK that knows five names only. Run by that SDK's own Python.

    TINKER_API_KEY=... python old_sdk.py URL MODEL LOSS

What the run calls "importance_sampling" is LOSS: its metadata says so. Prints the SDK's version and the loss.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import numpy as np
import tinker
from tinker import types


def main(url: str, model: str, loss: str) -> None:
    tokens = [(5 * position) % 200 + 20 for position in range(65)]
    inputs = {
        "target_tokens": np.array(tokens[1:]),
        "old_logprobs": np.full(64, -7.0, np.float32),
        "advantages": np.linspace(-1, 1, 64, dtype=np.float32),
    }
    tensors = {name: types.TensorData.from_numpy(array) for name, array in inputs.items()}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=tensors)
    training = tinker.ServiceClient(base_url=url).create_lora_training_client(
        model, rank=8, user_metadata={"treadle.loss.importance_sampling": loss}
    )
    output = training.forward_backward([datum, datum], "importance_sampling").result(timeout=120)
    print(version("tinker"), output.metrics["loss:sum"])


if __name__ == "__main__":
    main(*sys.argv[1:])
