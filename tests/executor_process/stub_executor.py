"""An executor whose model is arithmetic: everything else (link, session, main loop, tables) is the real thing.

``python -m tests.executor_process.stub_executor ENDPOINT``
"""

import secrets
import sys
import time

import torch

from executor_service.batch_builder import BatchBuilder
from executor_service.block_tables import BlockTables
from executor_service.completion import InlineCompleter
from executor_service.executor import Executor, StepLauncher
from executor_service.inbox import Inbox
from executor_service.input_batch import InputBatch
from executor_service.link import Link
from executor_service.plan_applier import PlanApplier, PlanLimits
from executor_service.row_state import RowState
from executor_service.sampler import SampledTokens
from executor_service.signals import Signals
from executor_service.step_output import HostStepOutput
from executor_service.wire import Capacity

CPU = torch.device("cpu")
VOCABULARY = 1000
SLEEPS, RAISES, EXHAUSTS_MEMORY, IS_NOT_FINITE = 999, 998, 997, 996
SLEEP_SECONDS = 1.5


def next_token(token: int, position: int) -> int:
    """What a row samples after ``token``, for ``position``."""
    return (7 * token + 13 * position + 1) % 900


class ArithmeticRunner:
    """Some input tokens make it misbehave."""

    def run(self, batch: InputBatch) -> SampledTokens:
        """See ``ModelRunner.run``."""
        given = set(batch.input_ids.tolist())
        if SLEEPS in given:
            time.sleep(SLEEP_SECONDS)
        if RAISES in given:
            raise RuntimeError("the device fell over\nwith details")
        if EXHAUSTS_MEMORY in given:
            raise torch.OutOfMemoryError("no memory left")
        last = batch.input_ids[batch.sample_indices]
        token_ids = [next_token(*pair) for pair in zip(last.tolist(), batch.sampling.position.tolist(), strict=True)]
        return SampledTokens(torch.tensor(token_ids, dtype=torch.int64), last != IS_NOT_FINITE)


def main(endpoint: str) -> int:
    """Run until told to stop."""
    signals = Signals()
    inbox = Inbox()
    link = Link(endpoint, "stub-executor", secrets.randbits(64), inbox)
    rows = RowState(8, 256, VOCABULARY, CPU)
    tables = BlockTables(max_rows=8, max_blocks_per_row=64, num_blocks=100, block_size=4)
    launcher = StepLauncher(
        rows,
        PlanApplier(PlanLimits(8, 64, 256, VOCABULARY), rows, tables),
        BatchBuilder(rows, tables, CPU, 1),
        ArithmeticRunner(),
        HostStepOutput,
    )
    link.start(Capacity("stub-executor", "stub", "m", "k", "cpu", "none", VOCABULARY, 256, 4, 100, 8, 64))
    signals.drain_first(link.drain, grace=5.0)
    stop = Executor(inbox, link, launcher, InlineCompleter(link)).run()
    link.close()
    if stop.exit_code:
        print(f"error: {stop.message}", file=sys.stderr)
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
