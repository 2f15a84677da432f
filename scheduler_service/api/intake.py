"""A request's life in this process: named, validated, submitted, read, and cleaned up whatever happens."""

import asyncio
import hashlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc

from scheduler_service.api.checkpoint import Checkpoint
from scheduler_service.api.detokenizer import Detokenizer
from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError, invalid
from scheduler_service.api.holds import Holds
from scheduler_service.api.live_requests import LiveRequest, LiveRequests
from scheduler_service.api.messages import Finish, ForwardAbort, Outcome, RowSampling, Submission
from scheduler_service.api.prompts import PromptEncoder, PromptPool
from scheduler_service.api.records import RequestRecorder, Watch
from scheduler_service.api.request import GenerationRequest, Prompt, ResumePoint
from scheduler_service.api.request_key import RequestKey
from scheduler_service.api.rules import RequestLimits
from scheduler_service.api.running_request import RunningRequest
from scheduler_service.api.sample import Sample
from scheduler_service.api.sample_text import SampleText
from scheduler_service.api.seeds import sample_seed
from scheduler_service.api.stop_strings import StopStrings
from scheduler_service.api.streams import Inbox, OutputStream
from scheduler_service.api.structured import GrammarChecker
from scheduler_service.api.validation import ValidatedRequest, check_prompt, encode_prompt, prompt_bytes, validate

_log = logging.getLogger("baton.api")

_MAX_DETOKENIZE_IDS = 1_000_000
_MAX_ABORTED = 10_000  # by one call
# A call that is cancelled when it has no more time than this left was not cut off: its own deadline has passed.
_DEADLINE_SLACK = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A request that may be submitted.

    Attributes:
        grammar: what its structured output became.
        complete: samples whose resumed output is a whole text of it.
    """

    validated: ValidatedRequest
    grammar: str = ""
    complete: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Entered:
    """A request that is under way, and its reader's side."""

    live: LiveRequest
    inbox: Inbox
    validated: ValidatedRequest
    samples: list[Sample]


class Intake:
    """Takes requests in, for every dialect alike."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: str,
        engine: EngineClient,
        max_waiting: int,
        recorder: RequestRecorder,
        grammars: GrammarChecker,
        holds: Holds,
    ) -> None:
        """Create an intake.

        Args:
            checkpoint: the text side of the model.
            model: its name for callers.
            engine: where requests go.
            max_waiting: samples of requests that may be under way in this process besides those that can run.
            recorder: follows every request.
            grammars: compiles structured outputs.
            holds: requests that outlive their connection.
        """
        self._checkpoint = checkpoint
        self._engine = engine
        self._recorder = recorder
        self._grammars = grammars
        self._encoder = PromptEncoder(checkpoint.tokenizer, checkpoint.chat_template)
        self._pool = PromptPool()
        self._requests = LiveRequests(engine, max_waiting, holds)
        self._has_warned_of_eos = False
        self._fixed_limits = RequestLimits(
            model=model, eos_token_ids=checkpoint.eos_token_ids, has_tokenizer=checkpoint.tokenizer is not None
        )

    @asynccontextmanager
    async def run(
        self, request: GenerationRequest, *, tenant: str = "", time_remaining: float | None = None
    ) -> AsyncIterator[RunningRequest]:
        """Validate, submit and watch over a request; leaving the block early aborts it, or keeps it for a retry.

        With a resume window, a request that runs here under the same name and asks for the same output is taken over.
        Where it runs in another api process, it is aborted there and goes on here from the caller's resume points.

        Args:
            request: the caller's.
            tenant: whom the caller has proven to be; request ids are each tenant's own.
            time_remaining: seconds until the call's own deadline, which ends the request; None = it has none.

        Raises:
            RequestError: the request cannot be served.
        """
        key = RequestKey(tenant, request.request_id or f"req-{secrets.token_hex(12)}")
        with self._recorder.watch(key.request_id) as watch:
            request = _of_tenant(request, tenant)
            deadline = math.inf if time_remaining is None else time.monotonic() + time_remaining - _DEADLINE_SLACK
            entered = await self._enter(key, request, watch)
            lost = False
            try:
                yield RunningRequest(
                    entered.live,
                    entered.inbox,
                    entered.validated,
                    entered.samples,
                    self._engine.limits.scheduler_id,
                    watch,
                )
            except (asyncio.CancelledError, ConnectionError):  # as Outlet says that the client has gone
                lost = time.monotonic() < deadline
                raise
            finally:
                self._requests.leave(entered.live, entered.inbox, lost=lost)

    async def tokenize(self, prompt: Prompt | None) -> list[int]:
        """Token ids of a prompt, as a request with it would have.

        Raises:
            RequestError: as for a request with this prompt.
        """
        limits = self._limits()
        checked = check_prompt(prompt, limits)
        ids = await self._pool.run(prompt_bytes(checked), lambda: encode_prompt(checked, limits, self._encoder))
        result: list[int] = ids.tolist()
        return result

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids.

        Raises:
            RequestError: FAILED_PRECONDITION without a tokenizer; INVALID_ARGUMENT for too many ids, or ids out of
                the vocabulary.
        """
        tokenizer = self._checkpoint.tokenizer
        if tokenizer is None:
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, "token_ids", "the served model has no tokenizer")
        if len(token_ids) > _MAX_DETOKENIZE_IDS:
            raise invalid("token_ids", f"has more than {_MAX_DETOKENIZE_IDS} ids")
        vocab_size = max(tokenizer.vocab_size, self._engine.limits.vocab_size)
        if token_ids and max(token_ids) >= vocab_size:
            raise invalid("token_ids", f"an id is not in the vocabulary of {vocab_size} ids")
        return await self._pool.run(
            len(token_ids), lambda: tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        )

    @property
    def num_live(self) -> int:
        """Requests under way in this process."""
        return len(self._requests)

    def abort(self, tenant: str, request_ids: Sequence[str]) -> None:
        """End a tenant's requests by name, whichever api process has them.

        Raises:
            RequestError: INVALID_ARGUMENT, too many or too long to be passed on to all of them.
        """
        if len(request_ids) > _MAX_ABORTED:
            raise invalid("request_ids", f"has more than {_MAX_ABORTED} ids")
        longest = RequestLimits.max_name_chars
        if any(len(request_id) > longest for request_id in request_ids):
            raise invalid("request_ids", f"has an id of more than {longest} characters")
        unknown = self._requests.abort(RequestKey(tenant, request_id) for request_id in request_ids)
        if unknown:
            self._engine.forward_abort([key.text() for key in unknown])

    def abort_forwarded(self, message: ForwardAbort) -> None:
        """End requests that another api process does not know, or has taken over."""
        keys = [RequestKey.from_text(name) for name in message.request_ids]
        if message.taken_over_at is None:
            self._requests.abort(keys)
        else:
            self._requests.supersede(keys, message.taken_over_at)

    async def drain(self, grace: float) -> None:
        """Take no more requests; those under way get ``grace`` seconds, then fail UNAVAILABLE."""
        await self._requests.drain(grace)

    async def close(self) -> None:
        """Start no more work on threads and in processes."""
        self._pool.close()
        await self._grammars.close()

    def _limits(self) -> RequestLimits:
        limits = self._engine.limits
        return replace(
            self._fixed_limits,
            eos_token_ids=self._eos_token_ids(limits.vocab_size),
            vocab_size=limits.vocab_size,
            max_total_tokens=limits.max_total_tokens,
        )

    def _eos_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """The checkpoint's ids that executors know: they refuse a request with any other, and none can be sampled."""
        eos = self._fixed_limits.eos_token_ids
        known = tuple(token_id for token_id in eos if 0 <= token_id < (vocab_size or math.inf))
        if known != eos and not self._has_warned_of_eos:
            self._has_warned_of_eos = True
            _log.warning(
                "end-of-sequence ids out of the vocabulary of %d ids are ignored: %s",
                vocab_size,
                ", ".join(str(token_id) for token_id in eos if token_id not in known),
            )
        return known

    async def _enter(self, key: RequestKey, request: GenerationRequest, watch: Watch) -> _Entered:
        arrived_at = time.monotonic()
        known = self._requests.find(key)
        admitted = None
        if known is not None and known.resume_window and request.resume_window_ms:
            admitted = await self._admit(request)
            if self._requests.find(key) is known:
                inbox = self._requests.take_over(known, admitted.validated, arrived_at)
                if inbox is not None:
                    return await self._return_to(known, inbox, admitted.validated)
        live = self._requests.open(key, arrived_at)
        inbox = live.inbox
        try:
            admitted = admitted or await self._admit(request)
            if request.resume_window_ms:
                # A retry that landed on another process than the request that it is about.
                self._engine.forward_abort([key.text()], arrived_at)
            seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
            self._requests.start(live, admitted.validated, seed, self._open_streams(live, request))
            samples = await self._samples(live, admitted.validated, admitted.complete)
            live.set_deadline(_seconds_left(request))
            self._submit(live, admitted, watch)
        except BaseException:
            self._requests.drop(live)
            raise
        return _Entered(live, inbox, admitted.validated, samples)

    async def _return_to(self, live: LiveRequest, inbox: Inbox, validated: ValidatedRequest) -> _Entered:
        self._engine.forward_abort([live.key.text()], live.call_arrived_at)  # others may have served it meanwhile
        try:
            live.set_deadline(_seconds_left(validated.request))
            return _Entered(live, inbox, validated, await self._samples(live, validated))
        except BaseException:
            self._requests.leave(live, inbox, lost=True)
            raise

    async def _admit(self, request: GenerationRequest) -> _Admitted:
        limits = self._limits()
        size = prompt_bytes(request.prompt) + _num_resumed(request)
        validated = await self._pool.run(size, lambda: validate(request, limits, self._encoder))
        structured = request.sampling.structured
        if structured is None:
            return _Admitted(validated)
        grammar = await self._grammars.check(structured)
        points = [point for point in request.resume if point.token_ids]
        over = await self._grammars.are_over(grammar, [point.token_ids for point in points])
        complete = frozenset(point.sample for point, is_over in zip(points, over, strict=True) if is_over)
        return _Admitted(validated, grammar, complete)

    def _open_streams(self, live: LiveRequest, request: GenerationRequest) -> list[OutputStream]:
        resumed = {point.sample: len(point.token_ids) for point in request.resume}
        return [
            self._engine.open_stream(
                live.inbox,
                resumed=resumed.get(index, 0),
                keep=request.resume_window_ms > 0,
                note_arrivals=request.output.timings,
            )
            for index in range(request.n)
        ]

    async def _samples(
        self, live: LiveRequest, validated: ValidatedRequest, complete: frozenset[int] = frozenset()
    ) -> list[Sample]:
        """Readers of all samples, who know what the caller has already; of a ``complete`` one it has everything."""
        size = _num_resumed(validated.request)
        samples = await self._pool.run(size, lambda: self._replayed(live, validated, complete))
        for sample in samples:
            sample.begin()
        return samples

    def _replayed(self, live: LiveRequest, validated: ValidatedRequest, complete: frozenset[int]) -> list[Sample]:
        stop = validated.request.stop
        strings = StopStrings(stop.stop_strings) if stop.stop_strings else None
        points = {point.sample: point for point in validated.request.resume}
        samples = []
        for index in range(len(live.streams)):
            text = SampleText(
                self._detokenizer(validated), strings, include_stop=stop.include_stop, min_tokens=stop.min_tokens
            )
            sample = Sample(live, validated, index, text, self._checkpoint.tokenizer, self._engine)
            sample.replay(points.get(index, ResumePoint(index, (), 0)), is_complete=index in complete)
            samples.append(sample)
        return samples

    def _detokenizer(self, validated: ValidatedRequest) -> Detokenizer | None:
        tokenizer = self._checkpoint.tokenizer
        if tokenizer is None or not (validated.text or validated.request.stop.stop_strings):
            return None
        return tokenizer.detokenizer(skip_special_tokens=validated.request.output.skip_special_tokens)

    def _submit(self, live: LiveRequest, admitted: _Admitted, watch: Watch) -> None:
        running = [index for index, stream in enumerate(live.streams) if not stream.ended]
        for index in running:
            stream = live.streams[index]
            if live.end_reason is None:
                self._engine.submit(_submission(live, admitted, index), stream)
            else:  # while its prompt was tokenised
                stream.finish(Finish(Outcome.ABORT))
        live.submitted = True
        if running and live.end_reason is None:
            watch.submitted(len(admitted.validated.prompt_token_ids))


def _of_tenant(request: GenerationRequest, tenant: str) -> GenerationRequest:
    if tenant and request.tenant not in ("", tenant):
        raise RequestError(grpc.StatusCode.PERMISSION_DENIED, "tenant", "is not the tenant of the call's token")
    return replace(request, tenant=tenant) if tenant else request


def _submission(live: LiveRequest, admitted: _Admitted, index: int) -> Submission:
    """What the engine gets of sample ``index``; the prompt's log probabilities only the first asks for."""
    validated = admitted.validated
    request, sampling = validated.request, validated.request.sampling
    return Submission(
        handle=live.streams[index].handle,
        prompt_token_ids=validated.prompt_token_ids,
        max_tokens=validated.max_tokens,
        sampling=RowSampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            seed=sample_seed(live.seed, index),
            logit_bias=tuple(sampling.logit_bias.items()),
            # Executors take a list that is longer than the vocabulary for nonsense.
            allowed_token_ids=tuple(dict.fromkeys(sampling.allowed_token_ids)),
            banned_token_ids=tuple(dict.fromkeys(sampling.banned_token_ids)),
            min_tokens=request.stop.min_tokens,
            stop_token_ids=validated.stop_token_ids,
            grammar=admitted.grammar,
            num_logprobs=request.output.logprobs,
            processed_logprobs=request.output.processed_logprobs,
            num_prompt_logprobs=request.output.prompt_logprobs if index == 0 else None,
        ),
        output_token_ids=next((tuple(point.token_ids) for point in request.resume if point.sample == index), ()),
        cache_salt=_cache_salt(request.tenant, request.cache_salt),
        priority=request.priority,
        queue_timeout_ms=request.queue_timeout_ms,
    )


def _cache_salt(tenant: str, salt: str) -> bytes:
    """Where the prefix cache's chain of hashes starts: for everybody without tenant and salt at the same place."""
    if not tenant and not salt:
        return b""
    name = tenant.encode()
    return hashlib.sha256(len(name).to_bytes(8, "little") + name + salt.encode()).digest()


def _num_resumed(request: GenerationRequest) -> int:
    return sum(len(point.token_ids) for point in request.resume)


def _seconds_left(request: GenerationRequest) -> float | None:
    deadline = request.stop.deadline_unix_ms
    return deadline / 1000 - time.time() if deadline else None
