"""The built-in sampler: continuous batching over the worker's own base model, with a cache of keys and values.

Each pass carries one row for every running sequence and up to a chunk of prompt tokens, whatever their adapters,
in ONE forward of the base model. It owns no thread and no clock but the one it is given, and knows no transport.

Invariant: what a sequence samples depends on its request and the weights alone. Prompts are attended to on a grid of
their own, rows keep their bits in any company (layout.py, cache.py), random numbers are keyed by seed, sample and
position (draw.py); so a sample is the same alone, in a crowd, after a restart, and when an earlier prompt began with
the same tokens (prefixes.py).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

from treadle.domain.ids import RequestId, TenantId
from treadle.domain.outcome import SampledPart, SampleOutcome
from treadle.engine.base_model import BaseModel
from treadle.errors import NonFiniteResult, TreadleError
from treadle.sampler.base import SampleRequest, SamplerLimits
from treadle.sampler.cache import Bucket, CacheShape, PromptCache, capacity_for
from treadle.sampler.job import Job, SampledTokens, check_sample, failed_outcome, num_free_places
from treadle.sampler.passes import Chunk, Drawn, RowPlans, run_pass
from treadle.sampler.prefixes import BLOCK_TOKENS, BlockKey, Prefixes, block_keys
from treadle.sampler.queue import TenantQueue
from treadle.sampler.stops import stop_rule, tokenizer_eos_id
from treadle.sampler.tokenizer import TokenBytes, load_token_bytes


class BuiltinSampler:
    """Implements sampler.base.Sampler. Not thread-safe; it must not run while another pass of `base` does."""

    def __init__(
        self,
        base: BaseModel,
        *,
        token_bytes: TokenBytes | None,
        eos_ids: frozenset[int],
        limits: SamplerLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._token_bytes = token_bytes
        self._eos_ids = eos_ids
        self._limits = limits
        self._clock = clock
        self._prefixes = Prefixes()
        # On other devices a library chooses a product's kernel by its number of rows, so nothing shows that a prompt
        # that is served from there keeps its bits.
        is_exact = base.device.type == "cpu"
        self._max_prefix_tokens = int(limits.max_cached_tokens * limits.prefix_share) if is_exact else 0
        # Larger pieces keep a larger device busy; on a CPU they must be the same for every prompt.
        self._piece_tokens = BLOCK_TOKENS if is_exact else limits.prefill_chunk_tokens
        self._tenant_share = max(1, int(limits.max_running * limits.max_tenant_share))
        self._cache_shape = CacheShape(
            num_layers=base.num_layers,
            num_kv_heads=base.num_kv_heads,
            head_dim=base.head_dim,
            dtype=base.dtype,
            device=base.device,
        )
        # Every live job by id. `_queue` holds those that still want slots, `_prefilling` those whose prompt is being
        # read (one slot is reserved for each), `_buckets` all running sequences.
        self._jobs: dict[RequestId, Job] = {}
        self._queue = TenantQueue()
        self._prefilling: list[Job] = []
        self._buckets: dict[int, Bucket[SampledTokens]] = {}
        self._num_held: Counter[TenantId] = Counter()
        # Jobs that hold cache, in the order they were let in; the last one yields when memory runs out.
        self._admitted: dict[RequestId, Job] = {}
        self._finished: list[SampleOutcome] = []
        self._plans = RowPlans(base.device)

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._finished)

    @property
    def num_waiting(self) -> int:
        return len(self._jobs) - len(self._admitted)

    @property
    def num_running(self) -> int:
        return sum(len(bucket.owners) for bucket in self._buckets.values())

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """See Sampler.submit."""
        for request in requests:
            if request.request_id in self._jobs:
                continue
            try:
                job = self._new_job(request)
            except TreadleError as error:
                self._finished.append(failed_outcome(request, error))
                continue
            self._jobs[request.request_id] = job
            self._queue.add(job)

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See Sampler.cancel."""
        for request_id in request_ids:
            job = self._jobs.get(request_id)
            if job is not None:
                self._forget(job)

    def step(self, max_seconds: float) -> list[SampleOutcome]:
        """See Sampler.step."""
        deadline = self._clock() + max_seconds
        while self._jobs:
            self._run_once()
            if self._finished or self._clock() >= deadline:
                break
        finished, self._finished = self._finished, []
        return finished

    def take_parts(self) -> list[SampledPart]:
        """See Sampler.take_parts."""
        watched = (sequence for job in self._jobs.values() if job.op.streams for sequence in job.sequences)
        return [part for sequence in watched if (part := sequence.news()) is not None]

    def _new_job(self, request: SampleRequest) -> Job:
        base = self._base
        check_sample(request.op, vocab_size=base.vocab_size, max_context_length=base.max_context_length)
        rule = stop_rule(
            request.op.params,
            eos_ids=self._eos_ids,
            token_bytes=self._token_bytes,
            num_free_places=num_free_places(request.op, base.max_context_length),
        )
        return Job(request, rule, self._block_keys(request))

    def _block_keys(self, request: SampleRequest) -> tuple[BlockKey, ...]:
        # An adapter without a name could be any.
        is_named = request.adapter is None or request.op.blob_key is not None
        if not is_named or self._max_prefix_tokens < BLOCK_TOKENS:
            return ()
        weights = None if request.adapter is None else request.op.blob_key
        return block_keys(request.tenant_id, weights, request.op.prompt)

    def _run_once(self) -> None:
        self._make_room_to_grow()
        self._let_in()
        chunks = self._next_chunks()
        buckets = [bucket for bucket in self._buckets.values() if bucket.owners]
        assert chunks or buckets, "a live job is neither running, prefilling nor let in"
        self._shrink_prefixes()
        result = run_pass(self._base, buckets, chunks, self._plans)
        for drawn in result.drawn:
            self._take_token(drawn)
        for chunk in chunks:
            self._after_chunk(chunk, result.failures.get(chunk.job.request.request_id))
        for job in {drawn.sequence.job: None for drawn in result.drawn}:
            if job.num_unfinished == 0 and self._is_live(job):
                self._finished.append(job.outcome())
                self._forget(job)

    # Letting in: slots and memory.

    def _let_in(self) -> None:
        """Hand out free slots: to jobs whose prompt is read, and to new ones, whose prompt is read next."""
        while self.num_running + len(self._prefilling) < self._limits.max_running:
            job = self._queue.pick(self._num_held, self._tenant_share)
            if job is None:
                return
            if not (self._start_sequences(job) if job.is_prefilled else self._start_prefill(job)):
                return
            self._queue.served(job.tenant_id)

    def _start_prefill(self, job: Job) -> bool:
        num_tokens = len(job.op.prompt)
        # Room for the first sample is part of the price: a prompt that cannot go on would only hold memory.
        if not self._fits(max(job.places_wanted, num_tokens + capacity_for(num_tokens + 1))):
            return False
        self._queue.remove(job)
        job.prompt_cache = PromptCache(self._cache_shape, num_tokens, piece_tokens=self._piece_tokens)
        self._prefilling.append(job)
        self._admitted[job.request.request_id] = job
        self._num_held[job.tenant_id] += 1
        return True

    def _start_sequences(self, job: Job) -> bool:
        """Start as many of a prefilled job's sequences as its fair part of slots and memory allows."""
        assert job.prompt_cache is not None
        assert job.unstarted
        num_places = len(job.op.prompt) + 1
        num_slots = self._limits.max_running - self.num_running - len(self._prefilling)
        allowed = min(
            len(job.unstarted),
            self._tenant_share - self._num_held[job.tenant_id],
            max(1, num_slots // max(1, self._queue.num_tenants)),
        )
        num_started = 0
        while num_started < allowed and self._fits(capacity_for(num_places)):
            sequence = job.unstarted.pop(0)
            self._place(sequence, num_places)
            assert sequence.bucket is not None
            sequence.bucket.data_N2SKCd[:, :, sequence.row, :, : num_places - 1] = job.prompt_cache.data_N2SKPd[
                :, :, 0, :, : num_places - 1
            ]
            self._num_held[job.tenant_id] += 1
            num_started += 1
        if not job.unstarted:
            job.prompt_cache = None
            self._queue.remove(job)
        return num_started > 0

    def _fits(self, num_places: int) -> bool:
        """Whether more places may be taken. When nothing runs, anything may: else nothing ever would."""
        if not self._prefilling and self.num_running == 0:
            return True
        return self._num_places() + num_places <= self._limits.max_cached_tokens

    def _num_places(self) -> int:
        prompts = sum(job.prompt_cache.num_places for job in self._admitted.values() if job.prompt_cache is not None)
        return prompts + sum(len(bucket.owners) * bucket.capacity for bucket in self._buckets.values())

    def _make_room_to_grow(self) -> None:
        """Move sequences that fill their bucket to the next; when memory is short, the newest jobs start over later."""
        while True:
            full = [
                sequence
                for bucket in self._buckets.values()
                for sequence in bucket.owners
                if sequence.num_cached >= bucket.capacity
            ]
            growth = sum(capacity_for(sequence.num_cached + 1) - capacity_for(sequence.num_cached) for sequence in full)
            if not full or len(self._admitted) == 1 or self._num_places() + growth <= self._limits.max_cached_tokens:
                break
            newest = next(reversed(self._admitted.values()))
            num_before = self._num_places()
            self._release(newest)
            newest.restart()
            # It comes back when there is room for more than it had, not to be thrown out at the same place again.
            newest.places_wanted = 2 * (num_before - self._num_places())
            self._queue.add(newest, first=True)
        for sequence in full:
            self._move(sequence)

    # Prompts that begin like earlier ones.

    def _serve_prefix(self, job: Job) -> None:
        """Take from earlier prompts what this one would read next, as far as it may be taken."""
        cache = job.prompt_cache
        assert cache is not None
        next_block = cache.num_filled // BLOCK_TOKENS
        found = self._prefixes.find(job.block_keys[next_block : job.num_reusable_blocks])
        for block in found:
            cache.fill_block(block)
        if found:
            job.reached(cache.num_filled, from_cache=True)
            self._prefixes.touch(job.block_keys[: next_block + len(found)])

    def _keep_prefix(self, job: Job, num_before: int) -> None:
        """Keep what a pass has read of a prompt, for later ones."""
        cache = job.prompt_cache
        assert cache is not None
        for index in range(num_before // BLOCK_TOKENS, min(len(job.block_keys), cache.num_filled // BLOCK_TOKENS)):
            if job.block_keys[index] not in self._prefixes:
                self._prefixes.put(job.block_keys[index], cache.block(index))
        self._prefixes.touch(job.block_keys[: cache.num_filled // BLOCK_TOKENS])
        self._shrink_prefixes()

    def _shrink_prefixes(self) -> None:
        self._prefixes.shrink(self._room_for_prefixes())

    def _room_for_prefixes(self) -> int:
        """Places that read prompts may take: their share, and no more than running sequences leave."""
        return max(0, min(self._max_prefix_tokens, self._limits.max_cached_tokens - self._num_places()))

    # Sequences in buckets.

    def _place(self, sequence: SampledTokens, num_places: int) -> None:
        capacity = capacity_for(num_places)
        bucket = self._buckets.get(capacity)
        if bucket is None:
            bucket = self._buckets[capacity] = Bucket(self._cache_shape, capacity)
        sequence.bucket, sequence.row = bucket, bucket.add(sequence)

    def _move(self, sequence: SampledTokens) -> None:
        assert sequence.bucket is not None
        kept = sequence.bucket.data_N2SKCd[:, :, sequence.row].clone()
        num_cached = sequence.num_cached
        self._displace(sequence)
        self._place(sequence, num_cached + 1)
        sequence.bucket.data_N2SKCd[:, :, sequence.row, :, :num_cached] = kept[:, :, :, :num_cached]

    def _displace(self, sequence: SampledTokens) -> None:
        assert sequence.bucket is not None
        moved = sequence.bucket.remove(sequence.row)
        if moved is not None:
            moved.row = sequence.row
        sequence.bucket = None

    # What a pass brought.

    def _next_chunks(self) -> list[Chunk]:
        """Whole chunks of prompts, up to one chunk's tokens together; who gets one goes to the back.

        A chunk ends on the grid of blocks or with its prompt. Of prompts that begin alike one is read at a time: the
        others take it over in the next pass.
        """
        num_free = chunk_tokens = self._limits.prefill_chunk_tokens
        chunks: list[Chunk] = []
        being_read: set[BlockKey] = set()
        num_keepable = self._room_for_prefixes() // BLOCK_TOKENS
        for job in list(self._prefilling):
            self._serve_prefix(job)
            assert job.prompt_cache is not None
            next_block = job.prompt_cache.num_filled // BLOCK_TOKENS
            awaited = job.block_keys[next_block : min(job.num_reusable_blocks, num_keepable)]
            if awaited and awaited[0] in being_read:
                continue
            num_tokens = min(chunk_tokens, len(job.op.prompt) - job.prompt_cache.num_filled)
            if num_tokens > num_free:
                break
            num_free -= num_tokens
            being_read.update(job.block_keys[next_block : next_block + num_tokens // BLOCK_TOKENS])
            chunks.append(Chunk(job, num_tokens))
            self._prefilling.remove(job)
            self._prefilling.append(job)
        return chunks

    def _take_token(self, drawn: Drawn) -> None:
        sequence, job = drawn.sequence, drawn.sequence.job
        if not self._is_live(job):
            return  # A sibling failed in this same pass.
        if not math.isfinite(drawn.logprob):
            self._fail(job, NonFiniteResult("the model's logits are not finite for this sample"))
            return
        if not sequence.push(drawn.token, drawn.logprob, drawn.top):
            return
        job.num_unfinished -= 1
        if sequence.bucket is None:
            job.unstarted.remove(sequence)
        else:
            self._displace(sequence)
            self._num_held[job.tenant_id] -= 1

    def _after_chunk(self, chunk: Chunk, failure: TreadleError | None) -> None:
        job = chunk.job
        if not self._is_live(job):
            return
        if failure is not None:
            self._fail(job, failure)
            return
        assert job.prompt_cache is not None
        job.reached(job.prompt_cache.num_filled, from_cache=False)
        self._keep_prefix(job, job.prompt_cache.num_filled - chunk.num_tokens)
        if job.prompt_cache.num_filled < job.prompt_cache.num_places:
            return
        self._prefilling.remove(job)
        self._num_held[job.tenant_id] -= 1
        job.is_prefilled = True
        if job.unstarted:
            self._queue.add(job, first=True)

    # Ends.

    def _is_live(self, job: Job) -> bool:
        return self._jobs.get(job.request.request_id) is job

    def _fail(self, job: Job, error: TreadleError) -> None:
        self._finished.append(failed_outcome(job.request, error))
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self._release(job)
        del self._jobs[job.request.request_id]
        if not self._jobs:
            # It holds on to adapters.
            self._plans = RowPlans(self._base.device)

    def _release(self, job: Job) -> None:
        """Take back everything a job holds: slots, memory, its place in the queue."""
        if job in self._prefilling:
            self._prefilling.remove(job)
            self._num_held[job.tenant_id] -= 1
        elif job.unstarted:
            self._queue.remove(job)
        for sequence in job.sequences:
            if sequence.bucket is not None:
                self._displace(sequence)
                self._num_held[job.tenant_id] -= 1
        job.prompt_cache = None
        self._admitted.pop(job.request.request_id, None)
        self._num_held += Counter()  # Drops tenants that hold nothing.


def open_sampler(base: BaseModel, *, limits: SamplerLimits | None = None) -> BuiltinSampler:
    """The built-in sampler of a loaded base model, with the stop rules and tokenizer that came with it.

    EOS ids: generation_config, else config, else the tokenizer's own. Raises ConfigError for a tokenizer that
    cannot be read; a model without one samples, but refuses stop strings.
    """
    directory = base.facts.tokenizer_dir
    token_bytes = load_token_bytes(directory)
    eos_ids = frozenset(base.eos_token_ids)
    if not eos_ids:
        tokenizer_id = tokenizer_eos_id(directory, token_bytes)
        eos_ids = frozenset() if tokenizer_id is None else frozenset({tokenizer_id})
    return BuiltinSampler(base, token_bytes=token_bytes, eos_ids=eos_ids, limits=limits or SamplerLimits())
