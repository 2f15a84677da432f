"""Executors without a model, many in one process: every step takes a fixed time, whatever it contains.

``python -m benchmarks.shadow_executors ENDPOINT --count 64 --step-ms 20`` dials a scheduler, follows its plans, and on
SIGTERM prints one JSON line: steps done, steps that started late because no plan was there, and how late.
"""

import argparse
import heapq
import json
import signal
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq

from baton_protos import execution_pb2 as pb
from baton_protos.columns import UINT8, pack, unpack
from scheduler_service.process import die_with_parent

_HEARTBEAT = 0.25
_SAMPLE = 1
_BLOCK_SIZE = 16


@dataclass
class Shadow:
    """One executor: its session, the plans that wait, and when the running step ends."""

    number: int
    socket: zmq.Socket[bytes]
    plans: deque[pb.StepPlan] = field(default_factory=deque)
    running: pb.StepPlan | None = None
    running_since: float = 0.0
    scheduler_id: str = ""
    epoch: int = 0
    received: int = 0
    steps: int = 0
    missed: int = 0
    starved: float = 0.0
    starved_us: int = 0  # of the running step
    idle_since: float = 0.0


class ShadowExecutors:
    """All executors of this process on one poll loop."""

    def __init__(
        self, endpoint: str, count: int, step_seconds: float, rows: int, vocab_size: int, max_model_len: int
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._step_seconds = step_seconds
        self._rows = rows
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._rng = np.random.default_rng(0)
        self._ends: list[tuple[float, int]] = []
        self._poller = zmq.Poller()
        self.shadows: list[Shadow] = []
        self._by_socket: dict[zmq.Socket[bytes], Shadow] = {}
        for number in range(count):
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            self._poller.register(socket, zmq.POLLIN)
            shadow = Shadow(number, socket)
            self.shadows.append(shadow)
            self._by_socket[socket] = shadow
        self.stopping = False

    def run(self) -> None:
        """Serve until ``stopping``."""
        next_beat = 0.0
        while not self.stopping:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + _HEARTBEAT
                for shadow in self.shadows:
                    self._beat(shadow)
            timeout = min(next_beat, self._ends[0][0] if self._ends else next_beat) - now
            for socket, _ in self._poller.poll(max(0, int(timeout * 1e3))):
                self._receive(self._by_socket[socket])
            self._finish_steps(time.monotonic())

    def report(self) -> dict[str, object]:
        """Totals over all executors since the start."""
        steps = sum(shadow.steps for shadow in self.shadows)
        return {
            "executors": len(self.shadows),
            "steps": steps,
            "missed": sum(shadow.missed for shadow in self.shadows),
            "starved_share": round(sum(s.starved for s in self.shadows) / max(1e-9, steps * self._step_seconds), 5),
        }

    def _beat(self, shadow: Shadow) -> None:
        if shadow.epoch:
            self._send(shadow, heartbeat=pb.Heartbeat(last_step=shadow.received))
        else:
            hello = pb.Hello(
                nonce=shadow.number + 1,
                executor_id=f"shadow-{shadow.number}",
                model_fingerprint="shadow",
                device="shadow",
                vocab_size=self._vocab_size,
                max_model_len=self._max_model_len,
                block_size=_BLOCK_SIZE,
                num_blocks=self._rows * -(-self._max_model_len // _BLOCK_SIZE),
                max_rows=self._rows,
                max_batched_tokens=max(2048, self._rows),
            )
            self._send(shadow, hello=hello)

    def _receive(self, shadow: Shadow) -> None:
        while True:
            try:
                envelope = pb.Envelope.FromString(shadow.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            kind = envelope.WhichOneof("body")
            if kind == "plan":
                shadow.received = envelope.plan.step_id
                shadow.plans.append(envelope.plan)
                if shadow.running is None:
                    self._start(shadow, time.monotonic())
            elif kind == "welcome":
                shadow.scheduler_id, shadow.epoch = envelope.scheduler_id, envelope.epoch
                self._send(shadow, ready=pb.Ready())

    def _start(self, shadow: Shadow, now: float) -> None:
        shadow.running = shadow.plans.popleft()
        shadow.starved_us = 0
        if shadow.idle_since and not shadow.running.after_idle:
            shadow.missed += 1
            shadow.starved += now - shadow.idle_since
            shadow.starved_us = int((now - shadow.idle_since) * 1e6)
        shadow.idle_since = 0.0
        shadow.running_since = now
        heapq.heappush(self._ends, (now + self._step_seconds, shadow.number))

    def _finish_steps(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            end, number = heapq.heappop(self._ends)
            shadow = self.shadows[number]
            plan = shadow.running
            assert plan is not None
            samples = int(np.count_nonzero(unpack(plan.flags, UINT8) & _SAMPLE))
            timings = pb.StepTimings(
                device_us=int(self._step_seconds * 1e6), starved_us=shadow.starved_us, plans_queued=len(shadow.plans)
            )
            token_ids = pack(self._rng.integers(3, self._vocab_size, samples))
            self._send(shadow, result=pb.StepResult(step_id=plan.step_id, token_ids=token_ids, timings=timings))
            shadow.steps += 1
            shadow.running = None
            if shadow.plans:
                self._start(shadow, end)  # a device goes on at once; our own lateness is not the scheduler's
            else:
                shadow.idle_since = end

    def _send(self, shadow: Shadow, **body: Any) -> None:
        envelope = pb.Envelope(
            version=1,
            scheduler_id=shadow.scheduler_id,
            boot_id=shadow.number + 1,
            epoch=shadow.epoch,
            acked=shadow.received,
            **body,
        )
        shadow.socket.send(envelope.SerializeToString())


def main() -> None:
    """Run until SIGTERM; SIGUSR1 starts the counting anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=2048)
    args = parser.parse_args()
    die_with_parent()
    executors = ShadowExecutors(
        args.endpoint, args.count, args.step_ms / 1e3, args.rows, args.vocab_size, args.max_model_len
    )

    def stop(signum: int, frame: object) -> None:
        executors.stopping = True

    def reset(signum: int, frame: object) -> None:
        for shadow in executors.shadows:
            shadow.steps = shadow.missed = 0
            shadow.starved = 0.0

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, reset)
    executors.run()
    print(json.dumps(executors.report()), flush=True)


if __name__ == "__main__":
    main()
