"""Errors after which a worker's device is of no use, so that nobody takes them for one request's.

Invariant: an error that is not recognised here costs at most the request that met it.
"""

from __future__ import annotations

import torch

from treadle.engine.memory import is_out_of_memory


def reraise_if_device_is_lost(error: Exception) -> None:
    """Raise `error` again when the device's context is beyond repair; every broad `except` in a worker asks first.

    After an illegal access, an assertion on the device or a hardware fault each later CUDA call fails too, so a worker
    that went on would fail every request. It must die, to be started again and have its runs restored.
    """
    if is_device_lost(error):
        raise error


def is_device_lost(error: BaseException) -> bool:
    """Whether an exception is one of those CUDA errors that stay. Running out of memory is not."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)
