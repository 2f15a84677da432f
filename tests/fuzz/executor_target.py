"""An executor's real session, tables and batches behind frames that no scheduler would send."""

from typing import cast

import torch

from baton_protos import execution_pb2 as pb
from executor_service.batch_builder import BatchBuilder
from executor_service.block_tables import BlockTables
from executor_service.executor import StepLauncher
from executor_service.inbox import Inbox, NewEpoch, PlanArrival, Stop
from executor_service.plan_applier import PlanApplier, PlanLimits
from executor_service.row_state import RowState
from executor_service.session import Session
from executor_service.step_output import HostStepOutput
from executor_service.step_plan import Fault, FaultCode, MalformedPlan, PlanError
from executor_service.wire import Capacity
from tests.executor_process.scheduler_stub import PlanMaker
from tests.executor_process.stub_executor import ArithmeticRunner, next_token
from tests.fuzz.mutation import Mutator, golden

_CPU = torch.device("cpu")
_BOOT_ID = 77
_SCHEDULER_ID = "true"
_PLANS_PER_EPOCH = 4
_STRANGERS_PER_PLAN = 5
_SECONDS = 0.001
_STOPPED = "stopped"
_SAMPLING = pb.RowSampling(temperature=0.0, top_p=1.0, seed=1)


class ExecutorTarget:
    """Epochs of a few good plans, between them frames of strangers that must change nothing, and at last a bad plan."""

    def __init__(self, seed: int) -> None:
        self._mutator = Mutator(seed)
        self._valid = golden(pb.Envelope)
        self._strange = self._mutator.frames(pb.Envelope, self._valid)
        self._now = 0.0
        self._epoch = 0
        rows = RowState(8, 256, 1000, _CPU)
        tables = BlockTables(max_rows=8, max_blocks_per_row=64, num_blocks=100, block_size=4)
        self._launcher = StepLauncher(
            rows,
            PlanApplier(PlanLimits(8, 64, 256, 1000), rows, tables),
            BatchBuilder(rows, tables, _CPU, 1),
            ArithmeticRunner(),
            HostStepOutput,
        )
        self._tokens: list[int] = []
        self.served = 0
        self._start()

    def throw(self) -> None:
        """One epoch."""
        self._welcome()
        rng = self._mutator.rng
        maker, row, prompt = PlanMaker(), rng.randrange(8), [rng.randrange(900) for _ in range(rng.randint(1, 6))]
        position, token = len(prompt), prompt[-1]
        for number in range(_PLANS_PER_EPOCH):
            for _ in range(_STRANGERS_PER_PLAN):
                self._session.receive(self._stranger(), self._tick())
            admits = {row: ([3, 1, 4, 15], _SAMPLING)}
            plan = maker.plan(admit=admits, prefill={row: prompt}) if number == 0 else maker.plan(decode=[row])
            self._session.receive(self._frame(plan=plan), self._tick())
            assert self._work() is None
            token = next_token(token, position)
            position += 1
            assert self._tokens == [token], (self._tokens, token)
            self.served += 1
        self._session.receive(self._corrupted(maker.plan(decode=[row])), self._tick())
        if self._work() is _STOPPED:  # its scheduler let it go, or would not have it: a new process takes its place
            self._start()

    @property
    def frames_per_throw(self) -> int:
        """Hostile frames in an epoch."""
        return _PLANS_PER_EPOCH * _STRANGERS_PER_PLAN + 1

    def finish(self) -> None:
        """Nothing is left to be done."""

    def close(self) -> None:
        """Nothing is held."""

    def _start(self) -> None:
        self._inbox = Inbox()
        capacity = Capacity("e", "m", "f", "k", "cpu", "none", 1000, 256, 4, 100, 8, 64)
        self._session = Session(capacity, _BOOT_ID, self._inbox, self._now)
        self._hello = self._sent("hello").hello

    def _welcome(self) -> None:
        self._epoch += 1
        while True:
            welcome = pb.Welcome(nonce=self._hello.nonce, accepted=True, heartbeat_ms=250, lease_ms=2000)
            self._session.receive(self._frame(welcome=welcome), self._tick())
            if any(isinstance(item, NewEpoch) for item in self._inbox._items):
                break
            self._hello = self._sent("hello").hello  # it had asked for a new session meanwhile
        self._work()

    def _work(self) -> str | None:
        """What the main loop does with all that has arrived; what was wrong with it."""
        while len(self._inbox):
            item = self._inbox.take()
            if isinstance(item, Stop):
                return _STOPPED
            if isinstance(item, NewEpoch):
                self._launcher.reset()
                self._session.ready(item.epoch)
                continue
            arrival = cast("PlanArrival", item)
            if isinstance(arrival.plan, MalformedPlan):
                return self._fault(FaultCode.BAD_PLAN, arrival.plan.message)
            try:
                self._tokens = self._launcher.launch(arrival.plan).wait().token_ids.tolist()
            except PlanError as error:
                return self._fault(error.code, str(error))
        return None

    def _fault(self, code: FaultCode, message: str) -> str:
        self._session.fault(self._epoch, Fault(1, code, message), self._tick())
        return message

    def _sent(self, kind: str) -> pb.Envelope:
        """The last frame of a kind that the executor has sent."""
        frames = [pb.Envelope.FromString(frame) for frame in self._session.outgoing]
        self._session.outgoing.clear()
        return next(frame for frame in reversed(frames) if frame.WhichOneof("body") == kind)

    def _stranger(self) -> bytes:
        while True:
            frame = next(self._strange)
            if _SCHEDULER_ID.encode() not in frame:
                return frame

    def _corrupted(self, plan: pb.StepPlan) -> bytes:
        frame = self._frame(plan=plan)
        match self._mutator.rng.randrange(4):
            case 0:
                return self._mutator.changed_message(pb.Envelope, frame)
            case 1:
                return self._mutator.changed_bytes(frame, self._mutator.rng.choice(self._valid))
            case 2:
                return self._frame(plan=self._mutator.random_message(pb.StepPlan.DESCRIPTOR))
            case _:
                changed = self._mutator.changed_message(pb.StepPlan, plan.SerializeToString())
                return self._frame(plan=pb.StepPlan.FromString(changed))

    def _frame(self, **body: object) -> bytes:
        envelope = pb.Envelope(
            version=1,
            scheduler_id=_SCHEDULER_ID,
            boot_id=_BOOT_ID,
            epoch=self._epoch,
            **body,  # type: ignore[arg-type]
        )
        return envelope.SerializeToString()

    def _tick(self) -> float:
        self._now += _SECONDS
        return self._now
