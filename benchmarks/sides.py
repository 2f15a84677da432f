"""The systems that `bench_peers` compares, each behind the same three calls."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Protocol

import grpc

from baton import ClusterError, LocalCluster
from benchmarks.bench_serve import cluster_options
from benchmarks.grpc_calls import WrongAnswerError, connect, generate_all
from benchmarks.machine import peak_rss_mb
from benchmarks.processes import Child, ProcessFailedError
from benchmarks.workloads import Request

DRIVERS: Final[Mapping[str, Sequence[str]]] = {
    "transformers-cb": ("drive_transformers.py", "--mode", "cb"),
    "transformers-generate": ("drive_transformers.py", "--mode", "generate"),
    "vllm": ("drive_vllm.py",),
    "openvino": ("drive_openvino.py",),
}
BATON = "baton"

_DRIVER_FOLDER = Path(__file__).parent / "peers"
_MAX_KV_TOKENS = 40960


class SideFailedError(Exception):
    """A side cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all sides get alike."""

    shape: str
    checkpoint: Path
    threads: int
    kv_gib: int
    max_batched_tokens: int
    time_limit: float
    start_limit: float
    peers: Path
    pythons: Mapping[str, Path]


class Side(Protocol):
    """A system under test."""

    def start(self) -> dict[str, object]:
        """Load the model; versions."""

    def run(self, requests: Sequence[Request]) -> float:
        """Run requests together; seconds.

        Raises:
            SideFailedError: any kind of failure.
        """

    def peak_rss_mb(self) -> float:
        """The most memory that all its processes had in RAM since they started, summed up."""

    def close(self) -> None:
        """Stop everything; may be started again."""


class BatonSide:
    """A local cluster, called through gRPC, one answer per request."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._cluster: LocalCluster | None = None
        self._loop: asyncio.Runner | None = None

    def start(self) -> dict[str, object]:
        setting = self._setting
        options = cluster_options(setting.checkpoint, setting.threads, setting.kv_gib, setting.max_batched_tokens)
        self._cluster = LocalCluster(options)
        try:
            self._cluster.start()
        except ClusterError as error:
            raise SideFailedError(str(error)) from error
        self._loop = asyncio.Runner()
        self._channel = self._loop.run(_connect(self._cluster.address))
        return {"name": f"baton {metadata.version('baton')}"}

    def run(self, requests: Sequence[Request]) -> float:
        assert self._loop is not None
        try:
            return self._loop.run(self._run(requests))
        except TimeoutError:
            raise SideFailedError(_too_long(self._setting.time_limit)) from None
        except (grpc.RpcError, WrongAnswerError) as error:
            raise SideFailedError(str(error)) from error

    def peak_rss_mb(self) -> float:
        assert self._cluster is not None
        return peak_rss_mb(self._cluster.scheduler_pid, *self._cluster.executor_pids().values())

    def close(self) -> None:
        if self._loop is not None:
            self._loop.run(self._channel.close())
            self._loop.close()
            self._loop = None
        if self._cluster is not None:
            self._cluster.stop()

    async def _run(self, requests: Sequence[Request]) -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.wait_for(generate_all(self._channel, requests), self._setting.time_limit)
        return loop.time() - began


class PeerSide:
    """A driver in its own process, which is stopped while it is not its turn."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._name = name
        self._setting = setting
        self._child: Child | None = None

    def start(self) -> dict[str, object]:
        python = self._python()
        script, *mode = DRIVERS[self._name]
        command = [str(python), str(_DRIVER_FOLDER / script), *mode, *self._arguments()]
        self._child = Child(self._name, command, self._environment(python), stdin=True)
        info = self._answer(self._setting.start_limit)
        self._signal(signal.SIGSTOP)
        return info

    def run(self, requests: Sequence[Request]) -> float:
        assert self._child is not None
        self._signal(signal.SIGCONT)
        try:
            self._child.say(driver_request(requests))
        except ProcessFailedError as error:
            raise SideFailedError(str(error)) from error
        answer = self._answer(self._setting.time_limit)
        self._signal(signal.SIGSTOP)
        if answer["lengths"] != [one.max_tokens for one in requests]:
            raise SideFailedError(f"gave {answer['lengths']} tokens instead of those asked for")
        return float(str(answer["wall_s"]))

    def peak_rss_mb(self) -> float:
        assert self._child is not None
        return peak_rss_mb(self._child.pid)

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()

    def _answer(self, limit: float) -> dict[str, object]:
        assert self._child is not None
        try:
            answer = self._child.json(limit)
        except ProcessFailedError as error:
            raise SideFailedError(str(error)) from error
        if "error" in answer:
            raise SideFailedError(answer["error"])
        return answer

    def _signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        try:
            os.killpg(self._child.pid, number)
        except ProcessLookupError:
            raise SideFailedError("it has ended") from None

    def _python(self) -> Path:
        if self._name in self._setting.pythons:
            return self._setting.pythons[self._name]
        if self._name.startswith("transformers"):
            return Path(sys.executable)
        python = self._setting.peers / self._name / "bin" / "python"
        if not python.exists():
            raise SideFailedError(f"not installed: there is no {python}, and no --python {self._name}=...")
        return python

    def _arguments(self) -> list[str]:
        setting = self._setting
        model, memory = setting.checkpoint, ["--kv-gib", str(setting.kv_gib)]
        if self._name.startswith("transformers"):
            memory = ["--kv-tokens", str(_kv_tokens(setting.checkpoint, setting.kv_gib))]
        elif self._name == "openvino":
            model = setting.peers / "openvino-models" / setting.checkpoint.name
            if not model.is_dir():
                raise SideFailedError(f"there is no {model}; drive_openvino.py says how to make it")
        limits = ["--threads", str(setting.threads), "--max-batched-tokens", str(setting.max_batched_tokens)]
        return ["--model", str(model), *limits, *memory]

    def _environment(self, python: Path) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": str(self._setting.threads)}
        openmp = python.parent.parent / "lib" / "libiomp5.so"
        if self._name == "vllm" and openmp.exists():  # its own advice for CPUs; tcmalloc is the caller's to add
            variables["LD_PRELOAD"] = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(openmp)]))
        return variables


async def _connect(address: str) -> grpc.aio.Channel:
    return connect(address)  # a channel belongs to the event loop it is made on


def driver_request(requests: Sequence[Request]) -> str:
    """The line that asks a driver to run requests."""
    return json.dumps({"requests": [[one.prompt, one.max_tokens] for one in requests]})


def _too_long(limit: float) -> str:
    return f"did not end within {limit:g} s"


def _kv_tokens(checkpoint: Path, kv_gib: int) -> int:
    config = json.loads((checkpoint / "config.json").read_text())
    values = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
    return int(min(_MAX_KV_TOKENS, kv_gib * 2**30 // (2 * values)))
