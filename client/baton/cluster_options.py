"""What a local cluster runs, and the command lines that follow from it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton.credentials import Credentials

HOST = "127.0.0.1"
# Less than what the launcher waits before it kills: a Ctrl-C is answered within 5 s whatever is running.
_SHUTDOWN_GRACE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What to run. None and empty values leave the choice to the processes.

    Attributes:
        model: checkpoint directory.
        executors: how many executor processes.
        port: gRPC port on 127.0.0.1; 0 picks a free one.
        api_processes: gRPC processes of the scheduler.
        run_ahead: unacknowledged plans per executor, ``"1"`` to ``"8"`` or ``"auto"``.
        dtype: of weights and KV cache, such as ``"float32"``; default: the checkpoint's.
        quantization: of weights, at load: ``"int8"``; default: none.
        kv_memory: KV cache of each executor, such as ``"2GiB"``.
        num_blocks: KV blocks of each executor, instead of ``kv_memory``.
        threads: compute threads of each executor; default: the cores, shared out evenly.
        max_batched_tokens: most tokens in one step.
        log_level: of all processes: debug, info, warning or error.
        log_dir: directory for one log file per process; default: the reporter gets their lines.
        scheduler_arguments: further flags for the scheduler.
        executor_arguments: further flags for every executor.
        credentials: what clients need where those flags ask them for something.
    """

    model: Path
    executors: int = 1
    port: int = 50051
    api_processes: int = 1
    run_ahead: str = "auto"
    dtype: str = ""
    quantization: str = ""
    kv_memory: str = ""
    num_blocks: int | None = None
    threads: int | None = None
    max_batched_tokens: int | None = None
    log_level: str = "warning"
    log_dir: Path | None = None
    scheduler_arguments: Sequence[str] = ()
    executor_arguments: Sequence[str] = ()
    credentials: Credentials = field(default_factory=Credentials)

    def scheduler_command(self) -> list[str]:
        """Module and flags of the scheduler."""
        return [
            "scheduler_service",
            *_flags(
                model=self.model,
                host=HOST,
                port=self.port,
                executor_endpoint=f"tcp://{HOST}:0",
                api_processes=self.api_processes,
                run_ahead=self.run_ahead,
                shutdown_grace=_SHUTDOWN_GRACE_SECONDS,
                log_level=self.log_level,
            ),
            *self.scheduler_arguments,
        ]

    def executor_command(self, executor_id: str, endpoint: str) -> list[str]:
        """Module and flags of one executor; ``endpoint`` is the scheduler's, for executors."""
        return [
            "executor_service",
            *_flags(
                scheduler=endpoint,
                model=self.model,
                executor_id=executor_id,
                dtype=self.dtype,
                quantization=self.quantization,
                kv_memory=self.kv_memory,
                num_blocks=self.num_blocks,
                threads=self.threads or max(1, _usable_cores() // max(1, self.executors)),
                max_batched_tokens=self.max_batched_tokens,
                log_level=self.log_level,
            ),
            "--die-with-parent",
            *self.executor_arguments,
        ]


def _flags(**values: object) -> list[str]:
    """Command line flags; None and empty values are left out."""
    return [
        part
        for name, value in values.items()
        if value is not None and value != ""
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
