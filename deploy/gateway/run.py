"""Runs the smg gateway, which speaks OpenAI's and Anthropic's HTTP APIs, in front of a scheduler until Ctrl-C.

``make run-gateway`` calls it. Without ``--worker`` it starts a cluster on this machine, too, and stops it at the end.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from baton import BatonError, ClusterOptions, LocalCluster
from baton.checkpoints import TINY_PYTHON
from baton.child_process import ChildProcess

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.2
_START_SECONDS = 60.0
_GRACE_SECONDS = 3.0
# Retries are the scheduler's business: it queues, and gateways would only repeat what it has refused for good reason.
_FLAGS = ("--disable-retries", "--policy", "round_robin", "--log-level", "error", "--shutdown-grace-period-secs", "1")


class GatewayError(Exception):
    """The gateway did not come up, or has died; the message is for a person."""


class Signals:
    """Notes that somebody wants to stop, and has the cluster stop."""

    def __init__(self) -> None:
        self.received = 0
        self.cluster: LocalCluster | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        if self.cluster is not None:
            self.cluster.request_stop()


def main() -> int:
    """Run the gateway; the exit code."""
    arguments = parse(sys.argv[1:])
    signals = Signals()
    try:
        if arguments.worker:
            run_gateway(arguments, arguments.worker, signals)
        else:
            port = arguments.vllm_grpc_port or free_port()
            options = ClusterOptions(
                model=arguments.model,
                executors=arguments.executors,
                port=arguments.port,
                threads=arguments.threads,
                scheduler_arguments=("--vllm-grpc-port", str(port)),
            )
            signals.cluster = LocalCluster(options)
            with signals.cluster as cluster:
                print(f"cluster: grpc {cluster.address}", flush=True)
                run_gateway(arguments, f"grpc://{_HOST}:{port}", signals)
    except (BatonError, GatewayError, OSError) as error:
        if not signals.received:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0 if signals.received == signal.SIGINT else 128 + signals.received


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="deploy/gateway/run.py", description=__doc__)
    parser.add_argument("--gateway", type=Path, required=True, help="the smg program")
    parser.add_argument("--http-port", type=int, default=30000, help="where HTTP is served; 0 picks a free port")
    parser.add_argument("--worker", default="", help="grpc://host:port, a scheduler's --vllm-grpc-port")
    parser.add_argument("--model", type=Path, default=TINY_PYTHON, help="of the cluster: checkpoint directory")
    parser.add_argument("--executors", type=int, default=1, help="of the cluster: executor processes")
    parser.add_argument("--threads", type=int, help="of the cluster: compute threads of each executor")
    parser.add_argument("--port", type=int, default=50051, help="of the cluster: gRPC port")
    parser.add_argument("--vllm-grpc-port", type=int, default=0, help="of the cluster; 0 picks a free port")
    return parser.parse_args(arguments)


def run_gateway(arguments: argparse.Namespace, worker: str, signals: Signals) -> None:
    """Run smg until somebody wants to stop, or the cluster has died.

    Raises:
        GatewayError: it did not come up, or has died.
        ClusterError: the cluster has.
    """
    port = arguments.http_port or free_port()
    with gateway(arguments.gateway, port, worker) as process:
        deadline = time.monotonic() + _START_SECONDS
        while not signals.received and not (model := served_model(port)):
            check(process, signals.cluster)
            if time.monotonic() > deadline:
                raise GatewayError(f"the gateway found no model at {worker} within {_START_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)
        if signals.received:
            return
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "def fibonacci(n):"}]})
        url = f"http://{_HOST}:{port}/v1"
        print(f"ready: {url}, model {model}; try:", flush=True)
        print(f"  curl {url}/chat/completions -H 'content-type: application/json' -d '{body}'", flush=True)
        while not signals.received:
            check(process, signals.cluster)
            time.sleep(_POLL_SECONDS)


@contextmanager
def gateway(program: Path, port: int, worker: str) -> Iterator[ChildProcess]:
    """The running gateway, ended afterwards."""
    ports = ("--host", _HOST, "--port", str(port), "--prometheus-host", _HOST, "--prometheus-port", str(free_port()))
    # The tokenizer comes from the scheduler; nothing is to be looked up on the internet by the model's name.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [str(program), "launch", *ports, "--worker-urls", worker, *_FLAGS]
    process = ChildProcess("gateway", command, environment, log, log)
    try:
        yield process
    finally:
        process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        while not process.exited() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        process.kill()


def check(process: ChildProcess, cluster: LocalCluster | None) -> None:
    """Whether everything is still running.

    Raises:
        GatewayError: the gateway has died.
        ClusterError: the cluster has.
    """
    if process.exited():
        raise GatewayError(process.last_words())
    if cluster is not None and cluster.failure is not None:
        raise cluster.failure


def served_model(port: int) -> str:
    """The model that the gateway serves; empty as long as it does not."""
    try:
        with urllib.request.urlopen(f"http://{_HOST}:{port}/readiness", timeout=5):
            pass
        with urllib.request.urlopen(f"http://{_HOST}:{port}/v1/models", timeout=5) as answer:
            models = json.load(answer)["data"]
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return ""
    return str(models[0]["id"]) if models else ""


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def log(line: str) -> None:
    """Pass a line of the gateway's log on."""
    sys.stderr.write(f"[gateway] {line}\n")


if __name__ == "__main__":
    sys.exit(main())
