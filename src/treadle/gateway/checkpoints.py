"""Checkpoints as clients name them: a tinker:// path becomes the row it stands for, if the caller may read it.

A path of somebody else's private checkpoint and one of nothing are refused in the same words.
Invariant: what leaves here is live, readable by the caller and of a kind that was asked for.
"""

from __future__ import annotations

from collections.abc import Collection

from treadle.domain.ids import CheckpointKind, TinkerPath, parse_tinker_path
from treadle.domain.ops import LoraSpec
from treadle.domain.records import CheckpointRecord, ModelRecord
from treadle.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated
from treadle.gateway.access import Access
from treadle.gateway.auth import Authenticator, Principal


async def readable_checkpoint(
    access: Access,
    principal: Principal,
    path: str,
    *,
    kinds: Collection[CheckpointKind],
    on_behalf_of: Principal | None = None,
) -> CheckpointRecord:
    """The checkpoint at `path`: the caller's own, a public one, one that a project shares with the caller, or one of
    whoever gave the caller an access token.

    Raises InvalidRequest for a malformed path or another kind, NotFound for anything that is not there for the caller.
    """
    parsed = parse_tinker_path(path)
    if parsed.kind not in kinds:
        allowed = " or ".join(sorted(kind.value for kind in kinds))
        raise InvalidRequest(f"{path[:200]!r} is a {parsed.kind.value} path; this call takes {allowed}")
    record = await access.checkpoint(principal, parsed, on_behalf_of=on_behalf_of)
    if record is None:
        raise NotFound(f"checkpoint {path[:200]!r} does not exist")
    return record


async def holder_of_token(auth: Authenticator, token: str | None, *, shown_by: Principal) -> Principal | None:
    """Whose key a weights access token is, None without one. Raises Forbidden for a token that nobody holds.

    shown_by: the caller, who has a share of its own in the tokens that others are asked about.

    Not Unauthenticated, which the SDK would take for its own key's end, and answer with a new login.
    """
    if token is None:
        return None
    try:
        return await auth.principal_of(token, address=shown_by.tenant_id)
    except Unauthenticated as error:
        raise Forbidden("weights_access_token is not a key of this server: send a key of the weights' owner") from error


def path_of_route(model_id: str, kind: str, name: str) -> TinkerPath:
    """The checkpoint that a URL names by its segments. Raises InvalidRequest for a kind or a name that is none."""
    return parse_tinker_path(f"tinker://{model_id}/{kind}/{name}")


def check_fits(checkpoint: CheckpointRecord, model: ModelRecord) -> None:
    """Raises InvalidRequest when the run cannot hold the checkpoint: another base model, or another adapter shape."""
    if checkpoint.base_model != model.base_model:
        raise InvalidRequest(
            f"{checkpoint.tinker_path} belongs to base model {checkpoint.base_model}, the run to {model.base_model}"
        )
    if _shape(checkpoint.lora) != _shape(model.lora):
        raise InvalidRequest(
            f"{checkpoint.tinker_path} has {_shape(checkpoint.lora)}, the run has {_shape(model.lora)}; create the run "
            "from the checkpoint instead"
        )


def _shape(lora: LoraSpec) -> str:
    """Everything but the seed, which only matters to a fresh adapter."""
    targets = ("attn", lora.train_attn), ("mlp", lora.train_mlp), ("unembed", lora.train_unembed)
    return f"rank {lora.rank}, alpha {lora.alpha:g}, targets {'+'.join(name for name, is_on in targets if is_on)}"
