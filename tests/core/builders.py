"""Short ways to schedulers and requests for tests."""

from typing import Any

import numpy as np

from scheduler_service.core.outputs import Outputs
from scheduler_service.core.request import Request, SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity, Scheduler
from scheduler_service.core.step_plan import SAMPLE, StepPlan, StepResult, StepTimings

NO_TIMINGS = StepTimings()
GREEDY = SamplingParams()


def capacity(
    block_size: int = 4, num_blocks: int = 32, max_rows: int = 8, max_batched_tokens: int = 64, max_model_len: int = 128
) -> ExecutorCapacity:
    return ExecutorCapacity(block_size, num_blocks, max_rows, max_batched_tokens, max_model_len, vocab_size=1000)


def request(
    handle: int, prompt: list[int], max_tokens: int = 8, stop_token_ids: tuple[int, ...] = (), **more: Any
) -> Request:
    sampling = more.pop("sampling", SamplingParams(stop_token_ids=stop_token_ids))
    return Request(handle, handle, np.array(prompt, np.int32), max_tokens, sampling, **more)


def schedule(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.schedule(now)
    assert plan is not None
    return plan


def settle(scheduler: Scheduler, plan: StepPlan, tokens: list[int], timings: StepTimings = NO_TIMINGS) -> Outputs:
    assert len(tokens) == np.count_nonzero(plan.flags & SAMPLE)
    return scheduler.settle(StepResult(plan.step_id, np.array(tokens, np.int32), timings=timings))
