"""A cluster, its shadow executors and its callers in one thread: whatever happens, streams are the oracle's."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.invariants import check_cluster
from scheduler_service.core.outputs import FinishedRequest, Outputs
from scheduler_service.core.request import FinishReason, SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import StepResult
from tests.fakes.shadow_executor import (
    POISON,
    ExecutorDiedError,
    Expected,
    Logprob,
    ShadowExecutor,
    answer,
    entries_of,
)

STATS = ("preemptions", "handovers", "prefix_hit_tokens", "stale_tokens", "audited_tokens", "audit_mismatches")


@dataclass
class Caller:
    """One request as its caller sees it."""

    expected: Expected
    sampling: SamplingParams
    deadline: float
    first: int  # the index of the first token that it has not brought along
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    deaths: int = 0  # of executors with it in flight
    is_held: bool = False
    end: FinishedRequest | None = None

    def take_prompt_logprobs(self, start: int, entries: list[Logprob]) -> None:
        assert start == 1 + len(self.prompt_logprobs), "a position is missing, or comes twice"
        assert not self.tokens, "the prompt's come first"
        self.prompt_logprobs += entries

    def finish(self, end: FinishedRequest, now: float) -> None:
        """Check the whole stream against what was expected."""
        assert self.end is None, "ended twice"
        self.end = end
        expected = self.expected
        wanted = expected.token_ids[self.first :]
        assert self.tokens == wanted[: len(self.tokens)]
        assert self.logprobs == expected.logprobs[self.first :][: len(self.logprobs)]
        assert self.prompt_logprobs == expected.prompt_logprobs[: len(self.prompt_logprobs)]
        match end.reason:
            case FinishReason.STOP | FinishReason.LENGTH:
                assert self.tokens == wanted
                assert len(self.logprobs) == len(expected.logprobs[self.first :])
                assert len(self.prompt_logprobs) == len(expected.prompt_logprobs)
                assert (end.reason is FinishReason.STOP) == expected.stops
                assert end.stop_token_id == (expected.token_ids[-1] if expected.stops else 0)
                assert self.sampling.encoded != POISON or len(expected.token_ids) < 3
                assert end.queue_us > 0
            case FinishReason.ERROR:
                assert self.deaths >= 3, "an innocent request was given up"
            case FinishReason.UNAVAILABLE:
                assert not self.tokens and end.queue_us == 0
                assert self.deadline <= now
            case reason:
                assert reason is FinishReason.ABORT
        assert end.executor_losses >= self.deaths


class World:
    """Results come back whenever somebody calls ``settle``."""

    def __init__(self, run_ahead: int | None, capacities: dict[str, ExecutorCapacity], vocab_size: int) -> None:
        self.cluster = Cluster(10_000, run_ahead)
        self.capacities = capacities
        self.vocab_size = vocab_size
        self.now = 1.0
        self.shadows: dict[str, ShadowExecutor] = {}
        self.in_flight: dict[str, deque[StepResult]] = {}
        self.callers: dict[int, Caller] = {}
        self.stats = dict.fromkeys(STATS, 0)
        self.due: set[str] = set()
        for name in capacities:
            self.join(name)

    def live(self) -> list[int]:
        return [handle for handle, caller in self.callers.items() if caller.end is None]

    def join(self, name: str) -> None:
        self.cluster.executor_ready(name, self.capacities[name], self.now)
        self.shadows[name] = ShadowExecutor(self.capacities[name])
        self.in_flight[name] = deque()

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: SamplingParams,
        *,
        given: int = 0,
        timeout: float = 0.0,
        **more: Any,
    ) -> int | None:
        """A request that brings up to ``given`` tokens of its own output; its handle if it was taken."""
        handle = len(self.callers)
        expected = answer(prompt, max_tokens, sampling, self.vocab_size)
        given = min(given, len(expected.token_ids) - 1)
        end = self.cluster.add_request(
            handle,
            np.array(prompt, np.int32),
            max_tokens,
            sampling,
            self.now,
            output_token_ids=np.array(expected.token_ids[:given], np.int32),
            queue_timeout=timeout,
            **more,
        )
        if end is not None:
            assert end.reason is FinishReason.REJECTED
            assert len(prompt) + max_tokens > self.cluster.max_total_tokens
            return None
        deadline = self.now + timeout if timeout else float("inf")
        self.callers[handle] = Caller(expected, sampling, deadline, given)
        return handle

    def dispatch(self, name: str) -> bool:
        """Run the executor's next plan; whether something happened."""
        self.now += 0.001
        self.finish(self.cluster.expire_unstarted(self.now))
        self.due.update(self.cluster.take_due())
        plan = self.cluster.schedule(name, self.now)
        if plan is None:
            self.due.discard(name)
            return False
        assert name in self.due, "nobody would have asked for this plan"
        try:
            self.in_flight[name].append(self.shadows[name].execute(plan))
        except ExecutorDiedError:
            self.lose(name)
            self.join(name)
        return True

    def settle(self, name: str) -> bool:
        if not self.in_flight[name]:
            return False
        self.take(self.cluster.settle(name, self.in_flight[name].popleft()))
        return True

    def take(self, outputs: Outputs) -> None:
        for item in outputs.prompt_logprobs:
            self.callers[item.handle].take_prompt_logprobs(item.start_position, entries_of(item.logprobs))
        handles = outputs.handles.tolist()
        for handle, token_id in zip(handles, outputs.token_ids.tolist(), strict=True):
            assert self.callers[handle].end is None
            self.callers[handle].tokens.append(token_id)
        entries = [] if outputs.logprobs is None else entries_of(outputs.logprobs)
        for index, entry in zip(outputs.logprob_indices.tolist(), entries, strict=True):
            self.callers[handles[index]].logprobs.append(entry)
        self.finish(outputs.finished)
        for handle in handles:
            caller = self.callers[handle]
            wanted = caller.expected.token_ids[caller.first :]
            assert caller.tokens == wanted[: len(caller.tokens)]
            if caller.sampling.num_logprobs is not None:
                assert len(caller.logprobs) == len(caller.tokens)

    def finish(self, ends: list[FinishedRequest]) -> None:
        for end in ends:
            self.callers[end.handle].finish(end, self.now)

    def abort(self, handle: int) -> None:
        end = self.cluster.abort(handle)
        assert end is not None and end.reason is FinishReason.ABORT
        self.finish([end])

    def hold(self, handle: int, held: bool) -> None:
        self.callers[handle].is_held = held
        self.cluster.hold(handle, held)

    def lose(self, name: str) -> None:
        """The executor vanishes with everything in flight."""
        self.keep_stats(name)
        for request in self.cluster.executors[name].requests_in_flight():
            self.callers[request.handle].deaths += 1
        self.finish(self.cluster.executor_lost(name, self.now).failed)
        del self.shadows[name], self.in_flight[name]

    def let_go(self, name: str) -> bool:
        """End a drained executor; whether it was."""
        if not self.cluster.is_drained(name):
            return False
        report = self.cluster.executor_lost(name, self.now)
        assert report.num_requeued == 0 and not report.failed
        del self.shadows[name], self.in_flight[name]
        return True

    def keep_stats(self, name: str) -> None:
        for key in STATS:
            self.stats[key] += getattr(self.cluster.executors[name].stats, key)

    def check(self) -> None:
        check_cluster(self.cluster)

    def finish_all(self) -> None:
        """Nobody interferes any more: everything must come to its end, and nothing be left over."""
        for name in self.capacities:
            if name not in self.shadows:
                self.join(name)
            self.cluster.resume_executor(name)
        for handle in self.live():
            self.hold(handle, False)
        busy = True
        while busy:
            progress = [self.dispatch(name) | self.settle(name) for name in list(self.shadows)]
            busy = any(progress)
            self.check()
        assert not self.live()
        assert self.cluster.num_requests == self.cluster.num_queued == 0
        for name, scheduler in self.cluster.executors.items():
            assert scheduler.num_running == scheduler.num_waiting == scheduler.kv.pool.num_used == 0
            assert not scheduler.running.departed
            self.keep_stats(name)
        assert self.stats["audit_mismatches"] == 0
