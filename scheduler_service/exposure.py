"""What must hold before the scheduler listens beyond this machine, and whether the files of its secrets can be used."""

import ipaddress
import logging

from scheduler_service.config import ConfigError, SchedulerSettings
from scheduler_service.tls import TlsError
from scheduler_service.tokens import TokenFileError, load_tokens

logger = logging.getLogger(__name__)


def check_security(settings: SchedulerSettings) -> None:
    """Refuse settings that expose a port without protection, or whose certificates or tokens cannot be used.

    Raises:
        ConfigError: the message names the option.
    """
    _check_exposure(settings)
    try:
        if settings.tls is not None:
            settings.tls.load()
    except TlsError as error:
        raise ConfigError(f"--tls-cert: {error}") from error
    try:
        if settings.tokens is not None and not len(load_tokens(settings.tokens)):
            raise ConfigError(f"--tokens: {settings.tokens} holds no token, so nobody could call")
    except TokenFileError as error:
        raise ConfigError(f"--tokens: {error}") from error


def warn_if_open(settings: SchedulerSettings) -> None:
    """Say that whoever reaches the gRPC port may use it, where that is not this machine only."""
    if settings.tokens is None and settings.tls_client_ca is None and not is_loopback(settings.host):
        logger.warning("whoever reaches %s may call: there are neither --tokens nor --tls-client-ca", settings.host)


def _check_exposure(settings: SchedulerSettings) -> None:
    if settings.insecure:
        return
    if settings.tls is None and not is_loopback(settings.host):
        raise ConfigError(
            f"--host: {settings.host} can be reached from other machines, and the gRPC port has no TLS; give "
            "--tls-cert and --tls-key ('baton keys' makes them), or --insecure where the network itself is protected"
        )
    if settings.vllm_grpc_port and not is_loopback(settings.vllm_grpc_host):
        raise ConfigError(
            f"--vllm-grpc-host: {settings.vllm_grpc_host} can be reached from other machines, and gateways speak to "
            "that port without TLS or tokens; give --insecure where the network itself is protected"
        )
    if settings.curve_key is None and not is_local_endpoint(settings.executor_endpoint):
        raise ConfigError(
            f"--executor-endpoint: {settings.executor_endpoint} can be reached from other machines, and executors need "
            "no keys; give --curve-key and --executor-keys ('baton keys' makes them), or --insecure where the network "
            "itself is protected"
        )


def is_local_endpoint(endpoint: str) -> bool:
    """Whether a ZeroMQ endpoint stays on this machine."""
    scheme, _, address = endpoint.partition("://")
    if scheme != "tcp":
        return scheme in {"ipc", "inproc"}
    return is_loopback(address.rpartition(":")[0])


def is_loopback(host: str) -> bool:
    """Whether a host can be reached from this machine only. Names other than localhost may mean anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
