"""stable_reinforce at the gateway: what a session is told of it, and what its passes need beyond their own bytes.

It refuses to know what the loss makes of it. Invariant: the payload that leaves here says everything, so that a replay
needs no record, however long ago that was dropped.
"""

from __future__ import annotations

import re

from treadle.domain.ids import SessionId
from treadle.domain.losses import spec_of
from treadle.domain.ops import PassOp
from treadle.domain.provenance import sampling_inputs
from treadle.gateway.context import Gateway
from treadle.wire.passes import with_inputs

# The first SDK whose loss functions include stable_reinforce (types/loss_fn_type.py).
_FIRST_SDK_WITH_IT = (0, 35)
_NOTICE = (
    "stable_reinforce is computed by this server's own objective, because the vendor's formula is not public: "
    "see docs/losses.md of treadle. Metrics of such passes have treadle_objective_tokens:sum."
)


def objective_notice(sdk_version: str) -> str | None:
    """What a new session must be told about stable_reinforce; None for an SDK that does not know the loss."""
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})", sdk_version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _FIRST_SDK_WITH_IT:
        return None
    return _NOTICE


async def with_sampling_records(gateway: Gateway, session_id: SessionId, op: PassOp, body: bytes) -> bytes:
    """The payload of a pass of this session: its body, with what was recorded for a loss that reads it.

    Raises InvalidRequest when the datums' provenance names what the session has no record of, or something else than
    what is recorded.
    """
    if not spec_of(op.loss.name).server_inputs:
        return body
    ids = {id_ for datum in op.datums if datum.provenance is not None for id_ in datum.provenance.sequence_ids()}
    records = await gateway.store.stability.use(session_id, ids)

    def build() -> bytes:
        added = [
            sampling_inputs(index, datum.provenance, datum.tokens, datum.inputs, records)
            for index, datum in enumerate(op.datums)
        ]
        return with_inputs(body, added)

    return await gateway.admission.run(build, num_bytes=len(body))
