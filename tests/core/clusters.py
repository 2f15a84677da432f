"""Clusters without a world around them: tests play their executors."""

import numpy as np

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.step_plan import SAMPLE, StepPlan, StepResult
from tests.core.builders import GREEDY, capacity

VOCAB = 1000


def cluster_of(*names: str, run_ahead: int | None = 1, **limits: int) -> Cluster:
    cluster = Cluster(1000, run_ahead)
    for name in names:
        cluster.executor_ready(name, capacity(**limits), 0.0)
    return cluster


def submit(cluster: Cluster, handle: int, prompt: list[int], max_tokens: int = 20, salt: bytes = b"") -> None:
    end = cluster.add_request(handle, np.array(prompt, np.int32), max_tokens, GREEDY, 0.0, cache_salt=salt)
    assert end is None


def run(cluster: Cluster, name: str, steps: int = 1) -> StepPlan | None:
    """So many steps of an executor that samples 7 all the time; the last plan."""
    plan = None
    for _ in range(steps):
        plan = cluster.schedule(name, 0.0)
        if plan is None:
            return None
        samples = int(np.count_nonzero(plan.flags & SAMPLE))
        cluster.settle(name, StepResult(plan.step_id, np.full(samples, 7, np.int32)))
    return plan
