"""Settings of the scheduler: flags override environment (``BATON_SCHEDULER_...``), which overrides the TOML file."""

import os
import tomllib
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from scheduler_service.tls import TlsFiles

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
RunAhead = Literal["auto"] | Annotated[int, Field(ge=1, le=8)]

_ENV_PREFIX = "BATON_SCHEDULER_"
_EVERY_ADDRESS = {"0.0.0.0", "::"}


class ConfigError(Exception):
    """The settings are wrong; the message is one line for a person."""


class SchedulerSettings(BaseSettings):
    """The scheduler: gRPC for callers, request state, KV block bookkeeping, step plans for executors."""

    model_config = SettingsConfigDict(
        env_prefix=_ENV_PREFIX,
        cli_prog_name="python -m scheduler_service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        extra="forbid",
    )

    model: Path = Field(description="checkpoint directory: config.json, tokenizer.json and the chat template are read")
    served_model_name: str = Field("", description="name that callers use; default: the directory's name")
    host: str = Field("127.0.0.1", description="address of the gRPC port")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    open_inference: bool = Field(
        True, description="serve the Open Inference Protocol (KServe, Triton) on that port too"
    )
    vllm_grpc_host: str = Field("127.0.0.1", description="address of the port for gateways")
    vllm_grpc_port: int = Field(
        0, ge=0, le=65535, description="plaintext port for gateways that speak vLLM's gRPC protocol, as smg; 0 is none"
    )
    executor_endpoint: str = Field(
        "tcp://127.0.0.1:50052", description="ZeroMQ endpoint that executors dial; port 0 picks a free one"
    )
    health_host: str = Field("127.0.0.1", description="address of the port for health probes")
    health_port: int = Field(
        0, ge=0, le=65535, description="plaintext port that answers grpc.health.v1 and nothing else; 0 is none"
    )
    tls_cert: Path | None = Field(None, description="certificate chain of the gRPC port, PEM; with --tls-key")
    tls_key: Path | None = Field(None, description="its private key, PEM")
    tls_client_ca: Path | None = Field(None, description="CA certificates, PEM: callers must have one that they signed")
    tokens: Path | None = Field(None, description="file of bearer tokens, 'tenant:token' lines: callers must send one")
    curve_key: Path | None = Field(None, description="secret key of the executors' endpoint; with --executor-keys")
    executor_keys: Path | None = Field(None, description="directory of public keys (*.pub) of executors that may join")
    insecure: bool = Field(False, description="allow listening beyond this machine without TLS or keys")
    metrics_host: str = Field("127.0.0.1", description="address of the Prometheus port")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port of all processes together; 0 is none")
    api_processes: int = Field(1, ge=1, le=64, description="gRPC processes")
    run_ahead: RunAhead = Field("auto", description="unacknowledged plans per executor: 1 to 8, or auto")
    max_queued_requests: int = Field(20_000, ge=1, description="requests that may wait, over all executors")
    max_held_requests: int = Field(
        256, ge=1, description="requests of one tenant that may wait for lost callers to return, per api process"
    )
    queue_timeout: float = Field(30.0, gt=0, description="seconds a request may wait while no executor is ready")
    grammar_timeout: float = Field(
        1.0, gt=0, description="seconds that compiling a request's schema, expression or grammar may take"
    )
    unread_window: int = Field(4096, ge=1, description="unread tokens after which a slow client's stream is held")
    slow_client_timeout: float = Field(60.0, gt=0, description="seconds after which a stream that is not read is cut")
    lease: float = Field(2.0, gt=0, description="seconds of silence after which an executor is taken for dead")
    shutdown_grace: float = Field(3.0, ge=0, description="seconds that running requests get when the scheduler stops")
    check_integrity: bool = Field(
        False, description="check all bookkeeping whenever the cluster falls idle; an error stops the scheduler"
    )
    log_level: LogLevel = Field("info", description="debug, info, warning or error")
    log_format: LogFormat = Field("text", description="text, or json: one object per line")
    log_requests: bool = Field(False, description="log every request's end at level info")
    tracing: bool = Field(False, description="send OpenTelemetry spans of requests; OTEL_* variables say where")
    config: Path | None = Field(None, description="TOML file with these settings, spelled with underscores")

    @model_validator(mode="after")
    def _halves_come_together(self) -> "SchedulerSettings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key must be given together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if (self.curve_key is None) != (self.executor_keys is None):
            raise ValueError("--curve-key and --executor-keys must be given together")
        return self

    @model_validator(mode="after")
    def _ports_are_apart(self) -> "SchedulerSettings":
        """Each is bound by a process that may start again: it would do so for ever."""
        ports = {
            "--port": (self.host, self.port),
            "--vllm-grpc-port": (self.vllm_grpc_host, self.vllm_grpc_port),
            "--health-port": (self.health_host, self.health_port),
            "--metrics-port": (self.metrics_host, self.metrics_port),
        }
        for (option, (host, port)), (other, (other_host, other_port)) in combinations(ports.items(), 2):
            if port and port == other_port and (host == other_host or {host, other_host} & _EVERY_ADDRESS):
                raise ValueError(f"{option} and {other} must not be the same")
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """Certificate and key of the gRPC port; None = no TLS."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)

    @property
    def model_name(self) -> str:
        """The name callers may put into a request."""
        return self.served_model_name or self.model.resolve().name

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))


def load_settings(arguments: Sequence[str]) -> SchedulerSettings:
    """Settings from command-line ``arguments``, environment and TOML file. ``--help`` prints and exits.

    Raises:
        ConfigError: a value is missing, unknown or out of range.
    """
    path = _config_path(arguments)

    class WithFile(SchedulerSettings):
        __doc__ = SchedulerSettings.__doc__
        model_config = SettingsConfigDict(toml_file=path)

    try:
        if path is not None and not path.is_file():
            raise ConfigError(f"--config: cannot read {path}")
        return WithFile(_cli_parse_args=list(arguments))
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from error
    except SettingsError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config: {path} is not TOML: {error}") from error


def _config_path(arguments: Sequence[str]) -> Path | None:
    """The file is needed before the flags are parsed, since its values are their defaults."""
    for argument, following in pairwise([*arguments, ""]):
        if argument == "--config":
            return Path(following)
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
    path = os.environ.get(f"{_ENV_PREFIX}CONFIG")
    return Path(path) if path else None


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    if not problems[0]["loc"]:  # what the settings say together
        return problems[0]["msg"].removeprefix("Value error, ")
    field = problems[0]["loc"][0]
    option = "--" + str(field).replace("_", "-")
    return f"{option}: " + " or ".join(problem["msg"] for problem in problems if problem["loc"][0] == field)


class ProcessSpec(BaseModel):
    """What the launcher tells a child process, as one JSON argument."""

    settings: SchedulerSettings
    scheduler_id: str
    engine_endpoint: str  # ipc://... between api processes and the engine
    index: int = 0  # which api process this is
    reuse_port: bool = False  # several api processes share the gRPC port
    metrics_directory: Path | None = None  # where api processes keep what they measure
