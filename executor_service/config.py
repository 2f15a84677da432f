"""Settings of an executor: flags override environment (``BATON_EXECUTOR_...``), environment overrides the TOML file."""

import os
import socket
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from executor_service.curve import is_local
from executor_service.endpoints import parse

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_ENV_PREFIX = "BATON_EXECUTOR_"
_MAX_ID_BYTES = 128
_UNSET = "automatic"  # how None reads on the command line and in --help


class ConfigError(Exception):
    """The settings are wrong; the message is one line for a person."""


class ExecutorSettings(BaseSettings):
    """An executor: owns one device with a model's weights and KV memory, runs the step plans of a scheduler."""

    model_config = SettingsConfigDict(
        env_prefix=_ENV_PREFIX,
        cli_prog_name="python -m executor_service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_parse_none_str=_UNSET,
        cli_exit_on_error=False,
        extra="forbid",
    )

    scheduler: str = Field(
        "tcp://127.0.0.1:50052",
        description="ZeroMQ endpoints of the schedulers to choose from, separated by commas; a name stands for all "
        "its addresses",
    )
    model: Path = Field(description="checkpoint directory: config.json and *.safetensors")
    executor_id: str | None = Field(None, description="name in the scheduler's eyes; automatic: host name and pid")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a CUDA device if there is one")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="auto is the checkpoint's")
    kv_memory: ByteSize | None = Field(
        None, description="KV cache memory, such as 2GiB; automatic: a quarter of available RAM, 90% of free VRAM"
    )
    num_blocks: int | None = Field(None, ge=1, description="exact number of KV blocks, instead of --kv-memory")
    block_size: int | None = Field(
        None, ge=1, le=1024, description="tokens per KV block; automatic: 16, or what --attention-backend flash needs"
    )
    max_rows: int = Field(
        256, ge=1, le=4096, description="requests that may run at a time, at most --max-batched-tokens"
    )
    max_batched_tokens: int = Field(2048, ge=1, le=1 << 20, description="tokens in a step")
    max_model_len: int | None = Field(None, ge=1, description="longest sequence; automatic: the checkpoint's")
    attention_backend: Literal["auto", "native", "triton", "flash", "reference"] = Field(
        "auto", description="auto takes the first of native (CPU), flash, triton (GPU), reference that can serve"
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="of the weights, at load: int8 (one scale per output channel) halves the bytes that a step reads "
        "and moves logits by about 1%; for bfloat16 on a CPU",
    )
    exact: bool = Field(
        False, description="on a GPU, results that do not depend on the batch, bit by bit; CPUs always give them"
    )
    cuda_graphs: bool = Field(True, description="on a GPU, run small steps as captured graphs")
    threads: int | None = Field(None, ge=1, description="compute threads; automatic: torch's choice")
    curve_key: Path | None = Field(
        None, description="this executor's secret key towards the scheduler; automatic: none, which needs the loopback"
    )
    scheduler_key: Path | None = Field(None, description="the scheduler's public key; with --curve-key")
    insecure: bool = Field(False, description="allow dialling a scheduler on another machine without keys")
    drain_grace: float = Field(
        20.0, ge=0, description="seconds to hand work over in after SIGTERM; then the process ends as it is"
    )
    metrics_host: str = Field("127.0.0.1", description="address of the Prometheus port")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; 0 is none")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")
    log_format: LogFormat = Field("text", description="text, or json: one object per line")
    die_with_parent: bool = Field(False, description="end when the parent process ends (Linux)")
    config: Path | None = Field(None, description="TOML file with these settings, spelled with underscores")

    @field_validator("executor_id")
    @classmethod
    def _fits_a_routing_id(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.isprintable() or not 0 < len(value.encode()) <= _MAX_ID_BYTES:
            raise ValueError(f"must be 1 to {_MAX_ID_BYTES} bytes of printable text")
        return value

    @model_validator(mode="after")
    def _is_protected(self) -> Self:
        if (self.curve_key is None) != (self.scheduler_key is None):
            raise ValueError("--curve-key and --scheduler-key must be given together")
        if self.curve_key is None and not self.insecure and not all(map(is_local, parse(self.scheduler))):
            raise ValueError(
                f"{self.scheduler} is on another machine, and there are no keys; give --curve-key and --scheduler-key "
                "('baton keys' makes them), or --insecure where the network itself is protected"
            )
        return self

    @property
    def identity(self) -> str:
        """This executor's name, given or made up."""
        return self.executor_id or f"{socket.gethostname()}-{os.getpid()}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (env_settings, init_settings)  # init: the TOML file's values


def load_settings(arguments: Sequence[str]) -> ExecutorSettings:
    """Settings from command-line ``arguments``, environment and TOML file. ``--help`` prints and exits.

    Raises:
        ConfigError: a value is missing, unknown or out of range.
    """
    try:
        values = {**_read_file(_config_path(arguments)), "_cli_parse_args": list(arguments)}
        return ExecutorSettings(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(detail)) for detail in error.errors())) from error
    except SettingsError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _config_path(arguments: Sequence[str]) -> str | None:
    """The file is needed before the flags are parsed, since its values are their defaults."""
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return os.environ.get(f"{_ENV_PREFIX}CONFIG")


def _read_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _explain(detail: dict[str, Any]) -> str:
    if not detail["loc"]:  # what the settings say together
        return str(detail["msg"]).removeprefix("Value error, ")
    name = ".".join(str(part) for part in detail["loc"]).replace("_", "-")
    return f"--{name}: {detail['msg']}"
