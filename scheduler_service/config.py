"""Settings of the scheduler: flags override environment (``BATON_...``), which overrides the configuration file."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

LogLevel = Literal["debug", "info", "warning", "error"]
RunAhead = Literal["auto"] | Annotated[int, Field(ge=1, le=8)]


class SchedulerSettings(BaseSettings):
    """The scheduler: gRPC for callers, request state, KV block bookkeeping, step plans for executors."""

    model_config = SettingsConfigDict(
        env_prefix="BATON_",
        toml_file="baton.toml",
        cli_prog_name="python -m scheduler_service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        extra="ignore",
    )

    model: Path = Field(description="checkpoint directory: config.json, tokenizer.json and the chat template are read")
    served_model_name: str = Field("", description="name that callers use; default: the directory's name")
    host: str = Field("127.0.0.1", description="address of the gRPC port")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    executor_endpoint: str = Field(
        "tcp://127.0.0.1:50052", description="ZeroMQ endpoint that executors dial; port 0 picks a free one"
    )
    api_processes: int = Field(1, ge=1, le=64, description="gRPC processes")
    run_ahead: RunAhead = Field("auto", description="unacknowledged plans per executor: 1 to 8, or auto")
    max_queued_requests: int = Field(20_000, ge=1, description="requests that may wait, over all executors")
    queue_timeout: float = Field(30.0, gt=0, description="seconds a request may wait while no executor is ready")
    lease: float = Field(2.0, gt=0, description="seconds of silence after which an executor is taken for dead")
    shutdown_grace: float = Field(3.0, ge=0, description="seconds that running requests get when the scheduler stops")
    check_integrity: bool = Field(
        False, description="check all bookkeeping whenever the cluster falls idle; an error stops the scheduler"
    )
    log_level: LogLevel = Field("info", description="debug, info, warning or error")

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


class ProcessSpec(BaseModel):
    """What the launcher tells a child process, as one JSON argument."""

    settings: SchedulerSettings
    scheduler_id: str
    engine_endpoint: str  # ipc://... between api processes and the engine
    index: int = 0  # which api process this is
    reuse_port: bool = False  # several api processes share the gRPC port
