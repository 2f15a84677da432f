"""``baton cluster``."""

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer

from baton.checkpoints import TINY_PYTHON
from baton.cli.options import DEFAULT_SERVER, examples
from baton.cli.outcome import exit_codes
from baton.client import Client
from baton.cluster_options import ClusterOptions
from baton.cluster_report import TerminalReporter
from baton.credentials import Credentials
from baton.errors import BatonError
from baton.local_cluster import LocalCluster

RunAhead = Literal["auto", "1", "2", "3", "4", "5", "6", "7", "8"]
LogLevel = Literal["debug", "info", "warning", "error"]
_QUIET_SECONDS = 5.0
EXAMPLES = examples(
    "baton cluster",
    "baton cluster --model ~/models/Qwen3-0.6B --executors 2 --port 50061",
    "baton cluster --dtype float32 --kv-memory 2GiB --log-dir logs",
)


def cluster(
    model: Annotated[
        Path, typer.Option(help="Checkpoint directory.", metavar="DIR", show_default="the shipped tiny_python")
    ] = TINY_PYTHON,
    executors: Annotated[int, typer.Option(min=1, max=64, help="Executor processes.")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port on 127.0.0.1; 0 picks a free one.")] = 50051,
    api_processes: Annotated[int, typer.Option(min=1, max=64, help="gRPC processes of the scheduler.")] = 1,
    run_ahead: Annotated[RunAhead, typer.Option(help="Unacknowledged plans per executor.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ... (default: the checkpoint's).")] = "",
    quantization: Annotated[str, typer.Option(help="Of weights, at load: int8, for bfloat16 on CPUs.")] = "",
    kv_memory: Annotated[str, typer.Option(help="KV cache of each executor, such as 2GiB (default: its choice).")] = "",
    num_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks of each executor, instead.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads of each executor (default: the cores, shared out).")
    ] = None,
    max_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens in one step.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="Of all processes.")] = "warning",
    log_dir: Annotated[
        Path | None, typer.Option(help="One log file per process goes here (default: stderr).", metavar="DIR")
    ] = None,
    interrupt_ok: Annotated[
        bool, typer.Option("--interrupt-ok", hidden=True, help="Exit with 0 on Ctrl-C, so that make keeps quiet.")
    ] = False,
) -> None:
    """Run a scheduler and executors on this machine until Ctrl-C."""
    options = ClusterOptions(
        model=model,
        executors=executors,
        port=port,
        api_processes=api_processes,
        run_ahead=run_ahead,
        dtype=dtype,
        quantization=quantization,
        kv_memory=kv_memory,
        num_blocks=num_blocks,
        threads=threads,
        max_batched_tokens=max_batched_tokens,
        log_level=log_level,
        log_dir=log_dir,
    )
    reporter = TerminalReporter(_QUIET_SECONDS)
    local = LocalCluster(options, reporter)
    signals = _StopSignals(local)
    with exit_codes():
        try:
            local.start()
            reporter.finish_progress()
            print(_ready_line(local, executors), flush=True)
            local.wait()
        except BatonError:
            if not signals.received:
                raise
        finally:
            local.stop()
            reporter.finish_progress()
    if interrupt_ok and signals.received == signal.SIGINT:
        return
    raise typer.Exit(128 + signals.received)


class _StopSignals:
    """The first Ctrl-C, SIGTERM or SIGHUP stops the cluster in order, the second at once."""

    def __init__(self, local: LocalCluster) -> None:
        self._local = local
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            self._local.request_kill()
            return
        self.received = number
        self._local.request_stop()


def _ready_line(local: LocalCluster, executors: int) -> str:
    with Client(local.address, credentials=Credentials()) as client:
        model = client.model_info()
    server = "" if local.address == DEFAULT_SERVER else f" --server {local.address}"
    many = f"{executors} executor" + ("s" if executors > 1 else "")
    return f"ready: grpc {local.address}, model {model.model}, {many}; try: baton generate{server} 'def fibonacci(n):'"
