"""What our side needs done inside vLLM's own worker process. It is loaded there by name and imports nothing of vLLM.

Invariant: it is called only while vLLM runs no request and remembers no prompt.
"""

from __future__ import annotations

from typing import Any


class CacheCleaning:
    """Mixed into vLLM's worker (its setting `worker_extension_cls`)."""

    model_runner: Any

    def treadle_clean_cache(self) -> int:
        """Overwrite the memory of keys and values; the number of tensors.

        What is no number there would come back in whoever gets the memory next: attention multiplies what it masks by
        zero, and zero times no number is none.
        """
        tensors = list(self.model_runner.kv_caches)
        assert tensors, "this vLLM keeps its keys and values somewhere else"
        for tensor in tensors:
            tensor.zero_()
        return len(tensors)
