"""A pool's tokenizer files, for clients that are not on this machine (`treadle tokenizer pull`).

No tokenizer is loaded here; files are packed. Invariant: only files with the names of a tokenizer,
from the pool's own directory.
"""

from __future__ import annotations

import asyncio
import io
import tarfile
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from treadle.errors import NotFound
from treadle.gateway.context import gateway_of, loaded_facts
from treadle.gateway.deps import PoolView
from treadle.gateway.routing import Resource

router = Resource("/api/v1/tokenizers")

# What transformers reads to build a tokenizer without the network; config.json tells it the model's type.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# The largest known tokenizers take about 40 MB.
MAX_TOKENIZER_BYTES = 256 * 2**20


@router.get("/{name:path}", answer_type="application/x-tar")
async def get_tokenizer(request: Request, name: str) -> Response:
    """An uncompressed tar of the tokenizer of base model `name`; files at its root, without owners or times."""
    gateway = gateway_of(request)
    await gateway.caller(request)
    pool = gateway.pool_for(name)
    facts = loaded_facts(pool)
    if facts.tokenizer_dir is None:
        raise NotFound(f"base model {pool.name} has no tokenizer")
    body = await asyncio.to_thread(_pack, Path(facts.tokenizer_dir), pool)
    return Response(body, media_type="application/x-tar")


def _pack(directory: Path, pool: PoolView) -> bytes:
    if not directory.is_dir():
        # The facts are the leader's, and so is the path.
        raise NotFound(f"the tokenizer of {pool.name} lies on the server that leads this base model; ask that one")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in TOKENIZER_FILES:
            path = directory / name
            if not path.is_file():
                continue
            num_bytes = path.stat().st_size
            if num_bytes + buffer.tell() > MAX_TOKENIZER_BYTES:
                raise NotFound("the tokenizer of this base model is too large to be served")
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = num_bytes, 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)
    return buffer.getvalue()
