"""What a dialect reads of a request: the facade of this package for servicers."""

import time
from dataclasses import replace

from scheduler_service.api.live_requests import LiveRequest
from scheduler_service.api.output import Delta
from scheduler_service.api.records import Watch
from scheduler_service.api.sample import Sample
from scheduler_service.api.seeds import sample_seed
from scheduler_service.api.streams import Inbox
from scheduler_service.api.validation import ValidatedRequest


class RunningRequest:
    """The reader's side of one request: ``async with intake.run(request) as running``.

    A streaming dialect loops over ``take()`` until ``ended``, and writes through an ``Outlet`` so that clients who do
    not read are cut off; one that answers once calls ``take_all()``. Both raise RequestError if the request fails.
    Leaving the block early aborts the request, or, if it has a resume window and the call was cancelled, keeps it for
    a retry.

    Attributes:
        request_id: the caller's name for it, or the one drawn here.
        seed: the caller's, or the one drawn here.
        sample_seeds: one per sample.
        model_fingerprint: of the executors at the time of submission.
        scheduler_id: whose process this is.
        text: whether text is returned.
    """

    def __init__(
        self,
        live: LiveRequest,
        inbox: Inbox,
        validated: ValidatedRequest,
        samples: list[Sample],
        scheduler_id: str,
        watch: Watch,
    ) -> None:
        self.request_id = live.key.request_id
        self.seed = live.seed
        self.sample_seeds = [sample_seed(live.seed, index) for index in range(len(samples))]
        self.model_fingerprint = live.model_fingerprint
        self.scheduler_id = scheduler_id
        self.text = validated.text
        self._validated = validated
        self._inbox = inbox
        self._samples = {sample.stream.handle: sample for sample in samples}
        self._watch = watch
        self._running = len(samples)
        self._began_at = time.monotonic()

    @property
    def prompt_length(self) -> int:
        """Prompt tokens."""
        return len(self._validated.prompt_token_ids)

    @property
    def ended(self) -> bool:
        """Whether the endings of all samples have been taken; there is nothing more then."""
        return not self._running

    def prompt_token_ids(self) -> list[int]:
        """The prompt as the model sees it."""
        ids: list[int] = self._validated.prompt_token_ids.tolist()
        return ids

    async def take(self) -> Delta:
        """Wait for news of any sample; everything that has gathered of that one. Each sample has one ending.

        Raises:
            RequestError: the request failed.
        """
        while True:
            sample = self._samples[(await self._inbox.next()).handle]
            delta = sample.take()
            if delta is None:
                continue
            if delta.token_ids:
                # After a retry tokens may be older than the call that this watch is for.
                first_token_at = max(sample.stream.first_token_at, self._began_at)
                self._watch.took(delta.sample, len(delta.token_ids), first_token_at)
            if sample.finish is not None:
                self._running -= 1
                self._watch.finished(sample.finish)
            return delta

    async def take_all(self) -> list[Delta]:
        """Wait for the end; the whole output of each sample, with its ending.

        Raises:
            RequestError: the request failed.
        """
        # Stop strings end a sample from here, so its tokens have to be looked at as they come.
        self._inbox.patient = not self._validated.request.stop.stop_strings
        for sample in self._samples.values():
            sample.release()  # a reader before this one may have been slow
        parts: list[list[Delta]] = [[] for _ in self._samples]
        while not self.ended:
            delta = await self.take()
            parts[delta.sample].append(delta)
        return [_joined(deltas) for deltas in parts]


def _joined(deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[-1],
        chunk_index=deltas[0].chunk_index,
        token_index=deltas[0].token_index,
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        text="".join(delta.text for delta in deltas),
        text_offset=deltas[0].text_offset,
        logprobs=[one for delta in deltas for one in delta.logprobs],
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
        best_effort=any(delta.best_effort for delta in deltas),
    )
