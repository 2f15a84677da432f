"""The least a scheduler can be: a ROUTER, hand-written protobuf frames, block tables kept in plain Python lists."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import zmq

from baton_protos import execution_pb2 as pb

SAMPLE, EXPLICIT = 1, 2


def int32s(values: list[int]) -> bytes:
    return np.array(values, "<i4").tobytes()


def table_hash(blocks: list[int]) -> int:
    value = 0
    for block in blocks:
        value = (value * 0x01000193 + block + 1) % 2**32
    return value


@dataclass
class PlanMaker:
    """Writes plans of one epoch; tables and cursors are the scheduler's own."""

    block_size: int = 4
    step_id: int = 0
    tables: dict[int, list[int]] = field(default_factory=dict)
    cursors: dict[int, int] = field(default_factory=dict)

    def plan(
        self,
        *,
        release: list[int] | None = None,
        admit: dict[int, tuple[list[int], pb.RowSampling]] | None = None,
        extend: list[tuple[int, int]] | None = None,
        decode: list[int] | None = None,
        prefill: dict[int, list[int]] | None = None,
        sample: bool = True,
        after_idle: bool = False,
    ) -> pb.StepPlan:
        """The next plan. Decode rows compute one token each, prefill rows the tokens given."""
        self.step_id += 1
        plan = pb.StepPlan(step_id=self.step_id, after_idle=after_idle, released_rows=int32s(release or []))
        for row in release or []:
            del self.tables[row], self.cursors[row]
        for row, (blocks, sampling) in (admit or {}).items():
            self.tables[row] = list(blocks)
            self.cursors.setdefault(row, 0)
            plan.admissions.add(row=row, block_ids=int32s(blocks), sampling=sampling)
        for row, block in extend or []:
            self.tables[row].append(block)
        plan.extend_rows = int32s([row for row, _ in extend or []])
        plan.extend_blocks = int32s([block for _, block in extend or []])
        counts = dict.fromkeys(decode or [], 1) | {row: len(ids) for row, ids in (prefill or {}).items()}
        plan.rows = int32s(list(counts))
        plan.num_tokens = int32s(list(counts.values()))
        plan.start_positions = int32s([self.cursors[row] for row in counts])
        plan.flags = bytes([SAMPLE] * len(decode or []) + [EXPLICIT | SAMPLE * sample] * len(prefill or {}))
        plan.prefill_token_ids = int32s([token for ids in (prefill or {}).values() for token in ids])
        slots = []
        for row, count in counts.items():
            for position in range(self.cursors[row], self.cursors[row] + count):
                block = self.tables[row][position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            self.cursors[row] += count
        plan.slot_mapping = int32s(slots)
        plan.table_hashes = np.array([table_hash(self.tables[row]) for row in counts], "<u4").tobytes()
        return plan


class SchedulerStub:
    """Speaks with one executor over a real socket; heartbeats and answers probes whenever it waits for a frame."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*", scheduler_id: str = "stub", lease_ms: int = 600) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._bind(endpoint)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.scheduler_id = scheduler_id
        self.lease_ms = lease_ms
        self.heartbeat_ms = 50
        self.epoch = 0
        self.boot_id = 0
        self.hello = pb.Hello()
        self.peer = b""
        self.sent_step = 0
        self.settled_step = 0
        self.heartbeats: list[tuple[float, pb.Heartbeat]] = []

    def _bind(self, endpoint: str) -> None:
        for _ in range(50):
            try:
                self._socket.bind(endpoint)
            except zmq.ZMQError:  # a predecessor's socket closes in the background
                time.sleep(0.05)
            else:
                return
        raise TimeoutError(endpoint)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def send(self, **body: object) -> None:
        envelope = pb.Envelope(
            version=1,
            scheduler_id=self.scheduler_id,
            boot_id=self.boot_id,
            epoch=self.epoch,
            acked=self.settled_step,
            **body,  # type: ignore[arg-type]
        )
        self._socket.send_multipart([self.peer, envelope.SerializeToString()])

    def send_plan(self, plan: pb.StepPlan) -> None:
        self.sent_step = plan.step_id
        self.send(plan=plan)

    def beat(self) -> None:
        self.send(heartbeat=pb.Heartbeat(last_step=self.sent_step, last_settled_step=self.settled_step))

    def receive(self, kind: str, timeout: float = 60.0) -> pb.Envelope:
        """The next frame of ``kind``; executor heartbeats are collected, other frames skipped."""
        return self.receive_where(lambda envelope: envelope.WhichOneof("body") == kind, timeout, kind)

    def receive_where(
        self, wanted: Callable[[pb.Envelope], bool], timeout: float = 60.0, what: str = ""
    ) -> pb.Envelope:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._socket.poll(self.heartbeat_ms):
                self.peer, data = self._socket.recv_multipart()
                envelope = pb.Envelope.FromString(data)
                self.boot_id = envelope.boot_id
                match envelope.WhichOneof("body"):
                    case "heartbeat":
                        self.heartbeats.append((time.monotonic(), envelope.heartbeat))
                    case "probe":
                        self.send(census=pb.Census(nonce=envelope.probe.nonce, executors=0))
                if wanted(envelope):
                    return envelope
            if self.epoch:
                self.beat()
        raise TimeoutError(f"no {what}")

    def welcome(self, timeout: float = 60.0) -> pb.Hello:
        """Begin a new epoch by answering the next Hello; that Hello."""
        self._start_epoch(self.receive("hello", timeout).hello)
        return self.hello

    def restart(self) -> None:
        """Begin a new epoch with an executor in any state."""
        self._start_epoch(self.hello)

    def _start_epoch(self, hello: pb.Hello) -> None:
        self.hello = hello
        self.epoch += 1
        self.sent_step = self.settled_step = 0
        self.heartbeats.clear()
        welcome = pb.Welcome(nonce=hello.nonce, accepted=True, heartbeat_ms=self.heartbeat_ms, lease_ms=self.lease_ms)
        self.send(welcome=welcome)
        answer = self.receive_where(self._answers_welcome, what="ready")
        if answer.WhichOneof("body") == "hello":
            self._start_epoch(answer.hello)

    def _answers_welcome(self, envelope: pb.Envelope) -> bool:
        kind = envelope.WhichOneof("body")
        if kind == "hello":  # one that crossed the Welcome is still the same one
            return envelope.hello.nonce != self.hello.nonce
        return kind == "ready" and envelope.epoch == self.epoch

    def result(self, step_id: int, timeout: float = 60.0) -> pb.StepResult:
        """The result of ``step_id``, which becomes the settled step."""
        result = self.receive_where(
            lambda e: e.WhichOneof("body") in ("result", "fault") and e.epoch == self.epoch, timeout, f"step {step_id}"
        )
        assert result.WhichOneof("body") == "result", result
        assert result.result.step_id == step_id
        self.settled_step = step_id
        return result.result


def tokens(result: pb.StepResult) -> list[int]:
    return np.frombuffer(result.token_ids, "<i4").tolist()
