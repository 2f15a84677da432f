"""A model in this process's hands: ``LLM`` runs a private cluster and feeds it batches of prompts."""

import weakref
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from baton.batch import BatchRequest, Outcome, run_batch
from baton.checkpoints import TINY_PYTHON
from baton.client import Client
from baton.cluster_options import ClusterOptions
from baton.cluster_report import TerminalReporter
from baton.errors import BatchError, BatonError, ClusterError, InvalidRequestError
from baton.local_cluster import LocalCluster
from baton.progress import batch_progress
from baton.sampling import SamplingParams
from baton.values import ChatMessage, Completion, Prompt

Conversation: TypeAlias = Sequence[ChatMessage] | Sequence[Mapping[str, str]]

# So many requests per row of the executors: when one ends, the next is already waiting beside it.
_REQUESTS_PER_ROW = 2


class LLM:
    """A model for batches: starts a cluster of its own on this machine, runs prompts through it, stops it.

    It stops when it is closed: by ``close()``, by leaving a ``with`` block, by dropping the last reference, or at the
    end of the program. Nothing of it outlives this process. Safe to share between threads.

        with LLM() as llm:
            for completion in llm.generate(["def mean(", "class Stack:"], SamplingParams(max_tokens=32)):
                print(completion.text)

    Args:
        model_dir: checkpoint directory; default: the small model that comes with Baton.
        executors: how many executor processes.
        dtype: of weights and KV cache, such as ``"float32"``; default: the checkpoint's.
        quantization: of weights, at load: ``"int8"``, for bfloat16 on CPUs; default: none.
        kv_memory: KV cache of each executor, such as ``"2GiB"``; default: the executor's choice.
        num_blocks: KV blocks of each executor, instead of ``kv_memory``.
        threads: compute threads of each executor; default: the cores, shared out evenly.
        max_batched_tokens: most tokens in one step; default: the executor's choice.
        log_dir: directory for one log file per process; default: warnings go to stderr.

    Raises:
        ClusterError: the cluster did not start, for example because there is no checkpoint; the message says why.
    """

    def __init__(
        self,
        model_dir: str | Path = TINY_PYTHON,
        *,
        executors: int = 1,
        dtype: str = "",
        quantization: str = "",
        kv_memory: str = "",
        num_blocks: int | None = None,
        threads: int | None = None,
        max_batched_tokens: int | None = None,
        log_dir: str | Path | None = None,
    ) -> None:
        options = ClusterOptions(
            model=Path(model_dir),
            executors=executors,
            port=0,
            dtype=dtype,
            quantization=quantization,
            kv_memory=kv_memory,
            num_blocks=num_blocks,
            threads=threads,
            max_batched_tokens=max_batched_tokens,
            log_dir=None if log_dir is None else Path(log_dir),
        )
        reporter = TerminalReporter(quiet_seconds=None)
        self._cluster = LocalCluster(options, reporter)
        self._stop = weakref.finalize(self, self._cluster.stop)
        try:
            self._cluster.start()
        finally:
            reporter.finish_progress()
        self._client = Client(self._cluster.address, credentials=options.credentials)
        rows = sum(executor.max_rows for executor in self._client.cluster_status().executors)
        self._in_flight = _REQUESTS_PER_ROW * max(1, rows)

    @property
    def client(self) -> Client:
        """For everything else, such as streams and tokenisation; it ends with this object."""
        return self._client

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Runs prompts to their ends, as many at a time as the executors hold.

        Args:
            prompts: one prompt or a list of them; each is text, token ids, or chat messages. An empty list is no
                prompt.
            sampling: for all prompts, or one for each; default: ``SamplingParams()``. A seed in a shared one is every
                prompt's seed.
            progress: show a progress bar on stderr; default: if that is a terminal.

        Returns:
            One completion for each prompt, in their order; a list for a single prompt, too.

        Raises:
            BatchError: some prompts failed; the others have finished, and it has all outcomes.
            InvalidRequestError: as many sampling parameters as prompts are needed.
            ClusterError: the cluster came down, or this object is closed.
        """
        return self._run(_separate(prompts), sampling, progress)

    def chat(
        self,
        conversations: str | Conversation | Sequence[str | Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Like ``generate``, for chat models: every prompt is a conversation to answer, a text is a user's message."""
        prompts = [
            [ChatMessage("user", one)] if isinstance(one, str) else _checked_conversation(one)
            for one in _separate(conversations)
        ]
        return self._run(prompts, sampling, progress)

    def close(self) -> None:
        """Stops the cluster, and with it every request, within 5 seconds; may be called more than once."""
        self._client.close()
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool | None,
    ) -> list[Completion]:
        if not self._stop.alive:
            raise ClusterError("this LLM is closed")
        requests = _requests(prompts, sampling)
        outcomes: dict[int, Outcome] = {}
        with batch_progress(len(requests), progress) as advance:

            def keep(index: int, outcome: Outcome) -> None:
                if isinstance(outcome, BatonError) and self._cluster.failure is not None:
                    raise self._cluster.failure
                outcomes[index] = outcome
                advance(outcome)

            run_batch(self._client, requests, in_flight=self._in_flight, on_outcome=keep)
        return _completions([outcomes[index] for index in range(len(requests))])


def _separate(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts one by one; a text, token ids or messages are a single one."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        raise InvalidRequestError("a conversation is a list of messages, even if it is only one", field="chat")
    listed = list(prompts)
    if listed and isinstance(listed[0], (Integral, ChatMessage, Mapping)):
        return [prompts]  # type: ignore[list-item]  # the isinstance above is beyond mypy
    return listed  # type: ignore[return-value]


def _checked_conversation(prompt: Prompt) -> Conversation:
    if not prompt or not all(isinstance(turn, (ChatMessage, Mapping)) for turn in prompt):
        raise InvalidRequestError("a conversation is a text or a list of messages with role and content", field="chat")
    return prompt  # type: ignore[return-value]


def _requests(
    prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None
) -> list[BatchRequest]:
    if sampling is None or isinstance(sampling, SamplingParams):
        sampling = [sampling or SamplingParams()] * len(prompts)
    if len(sampling) != len(prompts):
        raise InvalidRequestError(f"{len(prompts)} prompts need as many sampling parameters, not {len(sampling)}")
    return [BatchRequest(prompt, one.options()) for prompt, one in zip(prompts, sampling, strict=True)]


def _completions(outcomes: Sequence[Outcome]) -> list[Completion]:
    completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
    if len(completions) == len(outcomes):
        return completions
    index, first = next((i, outcome) for i, outcome in enumerate(outcomes) if isinstance(outcome, BatonError))
    failed = len(outcomes) - len(completions)
    message = f"{failed} of {len(outcomes)} prompts failed; prompt {index}: {first.message}"
    raise BatchError(message, outcomes) from first
