"""What a worker process takes of its machine. It refuses to know who asks; 0 is what cannot be known here."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from treadle.domain.outcome import WorkerVitals

_STATM = Path("/proc/self/statm")


def vitals_now() -> WorkerVitals:
    """Of this process."""
    device_bytes = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
    return WorkerVitals(resident_bytes=_resident_bytes(), device_bytes=device_bytes)


def _resident_bytes() -> int:
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
