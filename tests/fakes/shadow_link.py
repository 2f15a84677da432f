"""A shadow executor behind a real ZeroMQ socket: the wire's view of tests/fakes/shadow_executor."""

import random
import threading
import time

import zmq

from baton_protos import execution_pb2 as pb
from baton_protos.columns import FLOAT32, UINT8, UINT32, pack, unpack
from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.scheduler import ExecutorCapacity
from scheduler_service.core.step_plan import Admission, StepPlan, StepResult
from scheduler_service.engine.api_wire import decode_sampling
from tests.fakes.shadow_executor import ShadowExecutor


def decode_plan(plan: pb.StepPlan) -> StepPlan:
    """A StepPlan frame as the core's value."""
    admissions = tuple(
        Admission(
            a.row,
            unpack(a.block_ids),
            a.prompt_len,
            decode_sampling(a.sampling),
            unpack(a.token_ids),
            a.audit_from,
        )
        for a in plan.admissions
    )
    return StepPlan(
        step_id=plan.step_id,
        released_rows=unpack(plan.released_rows),
        admissions=admissions,
        extend_rows=unpack(plan.extend_rows),
        extend_blocks=unpack(plan.extend_blocks),
        rows=unpack(plan.rows),
        num_tokens=unpack(plan.num_tokens),
        start_positions=unpack(plan.start_positions),
        flags=unpack(plan.flags, UINT8),
        prefill_token_ids=unpack(plan.prefill_token_ids),
        slot_mapping=unpack(plan.slot_mapping),
        table_hashes=unpack(plan.table_hashes, UINT32),
        after_idle=plan.after_idle,
    )


def encode_result(result: StepResult) -> pb.StepResult:
    """The core's value as a StepResult frame."""
    return pb.StepResult(
        step_id=result.step_id,
        token_ids=pack(result.token_ids),
        logprobs=None if result.logprobs is None else encode_logprobs(result.logprobs),
        prompt_logprobs=[
            pb.RowPromptLogprobs(
                row=item.row, start_position=item.start_position, logprobs=encode_logprobs(item.logprobs)
            )
            for item in result.prompt_logprobs
        ],
        audited_tokens=result.audited_tokens,
        audit_mismatch_rows=pack(result.audit_mismatch_rows),
        grammar_ended=pack(result.grammar_ended, UINT8),
    )


def encode_logprobs(columns: LogprobColumns) -> pb.LogprobColumns:
    """The core's value as a message."""
    return pb.LogprobColumns(
        logprobs=pack(columns.logprobs, FLOAT32),
        ranks=pack(columns.ranks),
        top_counts=pack(columns.top_counts),
        top_token_ids=pack(columns.top_token_ids),
        top_logprobs=pack(columns.top_logprobs, FLOAT32),
    )


class ShadowLink(threading.Thread):
    """Serves a scheduler until ``stop``.

    ``loss`` is the share of frames thrown away, in both directions. From step ``stuck_at`` of its first session on it
    answers no plan any more, though it takes them and its heartbeats go on; 0 = never.
    """

    def __init__(
        self,
        endpoint: str,
        executor_id: str,
        capacity: ExecutorCapacity,
        step_seconds: float = 0.0,
        loss: float = 0.0,
        stuck_at: int = 0,
    ) -> None:
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self._endpoint = endpoint
        self._capacity = capacity
        self._executor_id = executor_id
        self._step_seconds = step_seconds
        self._loss = loss
        self._stuck_at = stuck_at
        self._rng = random.Random(executor_id)
        self._boot_id = self._rng.getrandbits(63)
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Vanish without a word, as a killed process does."""
        self._stopping.set()
        self.join()

    def run(self) -> None:
        self._shadow = ShadowExecutor(self._capacity)
        self._scheduler_id, self._epoch, self._seq = "", 0, 0
        self._results: dict[int, pb.StepResult] = {}
        self._received = 0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(self._endpoint)
        try:
            self._serve()
        except Exception as error:
            self.error = error
        finally:
            context.destroy(linger=0)

    def _serve(self) -> None:
        next_beat = 0.0
        while not self._stopping.is_set():
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + 0.05
                if self._epoch:
                    self._send(heartbeat=pb.Heartbeat(last_step=self._received))
                    for result in self._results.values():
                        self._send(result=result)
                else:
                    self._send(hello=self._hello())
            if self._socket.poll(20):
                self._receive(pb.Envelope.FromString(self._socket.recv()))

    def _receive(self, envelope: pb.Envelope) -> None:
        if self._rng.random() < self._loss:
            return
        for step_id in [s for s in self._results if s <= envelope.acked]:
            del self._results[step_id]
        match envelope.WhichOneof("body"):
            case "welcome" if envelope.epoch != self._epoch:
                assert envelope.welcome.accepted, envelope.welcome.reject_reason
                self._scheduler_id, self._epoch = envelope.scheduler_id, envelope.epoch
                if self._stuck_at and self._received >= self._stuck_at:
                    return
                self._shadow, self._received = ShadowExecutor(self._capacity), 0
                self._results.clear()
                self._send(ready=pb.Ready())
            case "welcome":
                assert envelope.welcome.accepted, envelope.welcome.reject_reason
                self._send(ready=pb.Ready())
            case "plan" if envelope.plan.step_id == self._received + 1:
                if self._step_seconds:
                    time.sleep(self._step_seconds)
                self._received += 1
                if self._stuck_at and self._received >= self._stuck_at:
                    return
                result = self._shadow.execute(decode_plan(envelope.plan))
                self._results[result.step_id] = encode_result(result)
                self._send(result=self._results[result.step_id])

    def _hello(self) -> pb.Hello:
        c = self._capacity
        return pb.Hello(
            nonce=self._boot_id >> 1,
            executor_id=self._executor_id,
            model_fingerprint="shadow",
            device="shadow",
            vocab_size=c.vocab_size,
            max_model_len=c.max_model_len,
            block_size=c.block_size,
            num_blocks=c.num_blocks,
            max_rows=c.max_rows,
            max_batched_tokens=c.max_batched_tokens,
        )

    def _send(self, **body: object) -> None:
        if "hello" not in body and self._rng.random() < self._loss:
            return
        self._seq += 1
        envelope = pb.Envelope(
            version=1,
            scheduler_id=self._scheduler_id,
            boot_id=self._boot_id,
            epoch=self._epoch,
            seq=self._seq,
            acked=self._received,
            **body,
        )
        self._socket.send(envelope.SerializeToString())
