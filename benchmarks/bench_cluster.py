"""One scheduler engine driving many shadow executors: do their steps ever wait for a plan, and what does it cost?

The engine is the real process behind its real sockets; this benchmark plays the api process and drops what it gets.
"""

import argparse
import signal
import time
from typing import Any

import numpy as np
import zmq

from baton_protos import engine_pb2 as pb
from baton_protos import execution_pb2
from baton_protos.columns import pack
from benchmarks.engine_rig import EngineProcess
from benchmarks.environment import cpu_seconds, environment
from benchmarks.figures import emit, run_main
from benchmarks.processes import Child, python_module

_PROMPT = 16
_MAX_TOKENS = 1900
_REPORT_SECONDS = 10.0


class ApiProcess:
    """Submits requests to an engine and counts the tokens that come back."""

    def __init__(self, endpoint: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, b"api-0")
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)
        self._rng = np.random.default_rng(0)
        self._next_handle = 0
        self.tokens = 0
        self.ready_executors = 0
        self._send(attach=pb.Attach())

    def _send(self, **body: Any) -> None:
        self._socket.send(pb.ToEngine(**body).SerializeToString())

    def submit(self) -> None:
        """One request of the standard length."""
        prompt = pack(self._rng.integers(3, 4096, _PROMPT))
        submit = pb.Submit(
            handle=self._next_handle,
            prompt_token_ids=prompt,
            max_tokens=_MAX_TOKENS,
            sampling=execution_pb2.RowSampling(top_p=1.0),
        )
        self._next_handle += 1
        self._send(submit=submit)

    def serve(self, seconds: float) -> None:
        """Take in outputs for so long; ended requests are replaced."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not self._socket.poll(int(left * 1e3) + 1):
                continue
            message = pb.FromEngine.FromString(self._socket.recv())
            self.tokens += len(message.outputs.token_ids) // 4
            for _ in message.outputs.finished:
                self.submit()
            if message.HasField("limits"):
                self.ready_executors = message.limits.ready_executors


def run(executors: int, rows: int, step_ms: float, seconds: float, settle: float) -> dict[str, object]:
    """Steps, missed steps and the engine's CPU for one number of executors."""
    with EngineProcess() as engine:
        flags = ["--count", executors, "--step-ms", step_ms, "--rows", rows]
        command = python_module("benchmarks.shadow_executors", engine.endpoint, *flags)
        with Child("shadow executors", command) as shadows:
            api = ApiProcess(engine.api_endpoint)
            while api.ready_executors < executors:
                api.serve(0.2)
            for _ in range(executors * rows):
                api.submit()
            api.serve(settle + executors * rows / 4096)  # all are admitted, the depth of run-ahead has settled
            shadows.process.send_signal(signal.SIGUSR1)
            api.tokens, cpu, begin = 0, cpu_seconds(engine.pid), time.monotonic()
            api.serve(seconds)
            elapsed, cpu = time.monotonic() - begin, cpu_seconds(engine.pid) - cpu
            shadows.process.terminate()
            report = shadows.json(_REPORT_SECONDS)
    steps = int(report["steps"])
    return {
        "bench": "cluster",
        **report,
        "rows": rows,
        "step_ms": step_ms,
        "tokens_per_s": round(api.tokens / elapsed),
        "engine_cpu_share": round(cpu / elapsed, 3),
        "engine_us_per_step": round(cpu / max(1, steps) * 1e6, 1),
    }


def main() -> None:
    """Print one JSON line per number of executors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executors", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rows", type=int, default=256, help="requests per executor")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time per figure")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds before that, for the depth of run-ahead")
    args = parser.parse_args()
    emit(**environment("numpy", "pyzmq", "protobuf"))
    for executors in args.executors:
        emit(**run(executors, args.rows, args.step_ms, args.seconds, args.settle))


if __name__ == "__main__":
    run_main(main)
