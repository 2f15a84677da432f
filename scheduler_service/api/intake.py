"""A request's life in this process: named, validated, submitted, read, and cleaned up whatever happens."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import grpc

from scheduler_service.api.checkpoint import Checkpoint
from scheduler_service.api.detokenizer import Detokenizer
from scheduler_service.api.engine_client import EngineClient
from scheduler_service.api.errors import RequestError, invalid, overloaded, unavailable
from scheduler_service.api.messages import Finish, Outcome, Submission
from scheduler_service.api.metrics import RequestMetrics, RequestWatch
from scheduler_service.api.prompts import PromptEncoder, PromptPool
from scheduler_service.api.request import GenerationRequest, Prompt
from scheduler_service.api.streams import OutputStream
from scheduler_service.api.validation import (
    RequestLimits,
    ValidatedRequest,
    check_prompt,
    encode_prompt,
    prompt_bytes,
    validate,
)

_log = logging.getLogger("baton.api")

_MAX_DETOKENIZE_IDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Delta:
    """What gathered since the last look.

    Attributes:
        token_index: absolute index of ``token_ids[0]`` in the output.
        text: what became certain; it need not align with ``token_ids``.
        text_offset: offset of ``text``, in code points.
        finish: how the request ended; None while it runs.
    """

    token_index: int
    token_ids: list[int]
    text: str
    text_offset: int
    finish: Finish | None


class RunningRequest:
    """The reader's side of one request.

    Attributes:
        request_id: the caller's name for it, or the one drawn here.
        seed: the caller's, or the one drawn here.
        model_fingerprint: of the executors at the time of submission.
        num_tokens: output tokens taken so far.
    """

    def __init__(
        self,
        request_id: str,
        seed: int,
        model_fingerprint: str,
        validated: ValidatedRequest,
        stream: OutputStream,
        detokenizer: Detokenizer | None,
        watch: RequestWatch,
    ) -> None:
        self.request_id = request_id
        self.seed = seed
        self.model_fingerprint = model_fingerprint
        self.num_tokens = 0
        self._validated = validated
        self._stream = stream
        self._detokenizer = detokenizer
        self._watch = watch
        self._text_length = 0

    @property
    def prompt_length(self) -> int:
        """Prompt tokens."""
        return len(self._validated.prompt_token_ids)

    def prompt_token_ids(self) -> list[int]:
        """The prompt as the model sees it."""
        ids: list[int] = self._validated.prompt_token_ids.tolist()
        return ids

    async def take(self) -> Delta:
        """Wait for output; everything that has gathered.

        Raises:
            RequestError: the request failed.
        """
        token_ids, finish = await self._stream.take()
        if token_ids:
            self._watch.took(len(token_ids), self._stream.first_token_at)
        if finish is not None:
            self._watch.finished(finish.outcome)
        index, offset = self.num_tokens, self._text_length
        self.num_tokens += len(token_ids)
        text = self._text(token_ids, last=finish is not None)
        self._text_length += len(text)
        return Delta(index, token_ids, text, offset, finish)

    async def take_all(self) -> Delta:
        """Wait for the end; the whole output.

        Raises:
            RequestError: the request failed.
        """
        await self._stream.wait_end()
        delta = await self.take()
        # Tokens that came before an error hide it once.
        return delta if delta.finish is not None else await self.take()

    def _text(self, token_ids: list[int], *, last: bool) -> str:
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.push(token_ids)
        return text + self._detokenizer.flush() if last else text


class Intake:
    """Takes requests in, for every dialect alike."""

    def __init__(
        self, checkpoint: Checkpoint, model: str, engine: EngineClient, max_live: int, metrics: RequestMetrics
    ) -> None:
        """Create an intake.

        Args:
            checkpoint: the text side of the model.
            model: its name for callers.
            engine: where requests go.
            max_live: requests that may be under way in this process.
            metrics: what is told of every request.
        """
        self._checkpoint = checkpoint
        self._engine = engine
        self._max_live = max_live
        self._metrics = metrics
        self._encoder = PromptEncoder(checkpoint.tokenizer, checkpoint.chat_template)
        self._pool = PromptPool()
        self._live: dict[str, OutputStream] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._fixed_limits = RequestLimits(
            model=model, eos_token_ids=checkpoint.eos_token_ids, has_tokenizer=checkpoint.tokenizer is not None
        )

    @asynccontextmanager
    async def run(self, request: GenerationRequest) -> AsyncIterator[RunningRequest]:
        """Validate, submit and watch over a request; leaving the block early aborts it.

        Raises:
            RequestError: the request cannot be served.
        """
        request_id = request.request_id or f"req-{secrets.token_hex(12)}"
        with self._metrics.watch() as watch, self._registered(request_id) as stream:
            limits = self._limits()
            validated = await self._pool.run(
                prompt_bytes(request.prompt), lambda: validate(request, limits, self._encoder)
            )
            seed = secrets.randbits(64) if request.seed is None else request.seed
            if not stream.ended:  # aborted while its prompt was tokenised
                self._engine.submit(_submission(stream.handle, seed, validated), stream)
                watch.submitted(len(validated.prompt_token_ids))
            yield RunningRequest(
                request_id,
                seed,
                self._engine.limits.model_fingerprint,
                validated,
                stream,
                self._detokenizer(request, validated),
                watch,
            )

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
        return len(self._live)

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """End requests by name; the names that are not known here."""
        unknown, submitted = [], []
        for request_id in request_ids:
            stream = self._live.get(request_id)
            if stream is None:
                unknown.append(request_id)
            elif stream.submitted:
                submitted.append(stream)
            else:
                stream.finish(Finish(Outcome.ABORT))
        self._engine.abort(submitted)
        return unknown

    async def drain(self, grace: float) -> None:
        """Take no more requests; those under way get ``grace`` seconds, then fail UNAVAILABLE."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            _log.info("%d requests outlived the grace period", len(self._live))
        for stream in self._live.values():
            stream.fail(unavailable("the scheduler is shutting down"))

    def close(self) -> None:
        """Start no more work on threads."""
        self._pool.close()

    def _limits(self) -> RequestLimits:
        limits = self._engine.limits
        return replace(self._fixed_limits, vocab_size=limits.vocab_size, max_total_tokens=limits.max_total_tokens)

    @contextmanager
    def _registered(self, request_id: str) -> Iterator[OutputStream]:
        if self._draining:
            raise unavailable("the scheduler is shutting down")
        if request_id in self._live:
            raise RequestError(grpc.StatusCode.ALREADY_EXISTS, "request_id", "a request of this name is under way")
        if len(self._live) >= self._max_live:
            raise overloaded(f"{self._max_live} requests are under way already")
        stream = self._engine.open_stream()
        self._live[request_id] = stream
        self._idle.clear()
        try:
            yield stream
        finally:
            self._engine.forget(stream)
            del self._live[request_id]
            if not self._live:
                self._idle.set()

    def _detokenizer(self, request: GenerationRequest, validated: ValidatedRequest) -> Detokenizer | None:
        tokenizer = self._checkpoint.tokenizer
        if tokenizer is None or not validated.text:
            return None
        return tokenizer.detokenizer(skip_special_tokens=request.skip_special_tokens)


def _submission(handle: int, seed: int, request: ValidatedRequest) -> Submission:
    return Submission(
        handle=handle,
        prompt_token_ids=request.prompt_token_ids,
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        seed=seed,
    )
