"""Where tests and benchmarks find an environment with vLLM: docs/vllm.md says how one is made."""

from __future__ import annotations

import os
from pathlib import Path

# The Python of that environment.
VARIABLE = "TESTS_VLLM_PYTHON"
NOT_FOUND = f"no environment with vLLM: make one with scripts/vllm_env DIR, and set {VARIABLE}"
_ROOT = Path(__file__).parents[3]
_USUAL_PLACES = (_ROOT / ".vllm-env", _ROOT.parent / "vllm-env")


def find_vllm_python() -> Path | None:
    """The Python with vLLM, or None."""
    named = os.environ.get(VARIABLE)
    candidates = [Path(named)] if named else [place / "bin" / "python" for place in _USUAL_PLACES]
    return next((candidate for candidate in candidates if candidate.is_file()), None)
