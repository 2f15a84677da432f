"""Core and executor in one process and one thread: what serving costs without a split.

Speaks the protocol of the peers' drivers. The core's plans go straight to the executor's step launcher, its tokens
straight back: no sockets, no wire, nothing at the same time.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.peers.protocol import serve
from executor_service import startup, step_plan
from executor_service.config import ExecutorSettings
from scheduler_service.core.cluster import Cluster
from scheduler_service.core.request import SamplingParams
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import Admission, StepPlan, StepResult

_EXECUTOR = "executor-0"
_GREEDY = SamplingParams()
_SAME_COLUMNS = (
    "step_id",
    "released_rows",
    "extend_rows",
    "extend_blocks",
    "rows",
    "num_tokens",
    "start_positions",
    "flags",
    "prefill_token_ids",
    "slot_mapping",
    "table_hashes",
    "after_idle",
)


class InProcess:
    """A whole Baton without a second process."""

    def __init__(self, settings: ExecutorSettings) -> None:
        self._launcher, capacity, *_ = startup.prepare(settings)
        self._cluster = Cluster(max_queued_requests=100_000, run_ahead=1)
        own = ExecutorCapacity(
            block_size=capacity.block_size,
            num_blocks=capacity.num_blocks,
            max_rows=capacity.max_rows,
            max_batched_tokens=capacity.max_batched_tokens,
            max_model_len=capacity.max_model_len,
            vocab_size=capacity.vocab_size,
        )
        self._cluster.executor_ready(_EXECUTOR, own, 0.0)

    def info(self) -> dict[str, str]:
        return {"name": "in process"}

    def run(self, requests: list[tuple[list[int], int]]) -> list[int]:
        for handle, (prompt, max_tokens) in enumerate(requests):
            end = self._cluster.add_request(handle, np.array(prompt, np.int32), max_tokens, _GREEDY, 0.0)
            if end is not None:
                raise RuntimeError(end.message)
        counts = np.zeros(len(requests), np.int64)
        while (plan := self._cluster.schedule(_EXECUTOR, 0.0)) is not None:
            token_ids = self._launcher.launch(_for_executor(plan)).wait().token_ids
            outputs = self._cluster.settle(_EXECUTOR, StepResult(plan.step_id, token_ids))
            counts += np.bincount(outputs.handles, minlength=len(requests))
        return counts.tolist()


def _for_executor(plan: StepPlan) -> step_plan.StepPlan:
    """The same plan as the executor's type; what the wire does otherwise."""
    admissions = tuple(_admission(admission) for admission in plan.admissions)
    return step_plan.StepPlan(admissions=admissions, **{name: getattr(plan, name) for name in _SAME_COLUMNS})


def _admission(admission: Admission) -> step_plan.Admission:
    return step_plan.Admission(
        row=admission.row,
        block_ids=admission.block_ids,
        sampling=step_plan.RowSampling(),
        prompt_len=admission.num_prompt_tokens,
    )


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-memory", required=True)
    args = parser.parse_args()
    settings = ExecutorSettings(model=args.model, threads=args.threads, kv_memory=args.kv_memory, dtype="bfloat16")
    serve(lambda: InProcess(settings))


if __name__ == "__main__":
    main()
