"""How the clients' gRPC channels are set up."""

import atexit
import json
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import grpc

from baton.credentials import Credentials
from baton.shield import ShieldedChannel

SERVICE = "baton.v1.Generation"
# The standard health service, spoken in raw bytes: a request for the whole server ("") is an empty message, and the
# only answer of interest is {status: SERVING}. That spares callers the grpcio-health-checking package.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_REQUEST = b""
HEALTH_SERVING = b"\x08\x01"

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_RETRIED_METHODS = ("Generate", "Abort", "Tokenize", "Detokenize", "GetModelInfo", "GetClusterStatus")
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            # Streams are not among them: the client itself takes those up again, elsewhere if need be.
            "name": [{"service": SERVICE, "method": method} for method in _RETRIED_METHODS],
            # gRPC retries only while nothing of an answer has arrived.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


_channels: weakref.WeakSet[ShieldedChannel] = weakref.WeakSet()  # the synchronous ones
_channels_lock = threading.Lock()


def open_channel(target: str, credentials: Credentials) -> ShieldedChannel:
    """A synchronous channel, safe from Ctrl-C.

    Raises:
        CredentialsError: the credentials' files cannot be used.
    """
    if credentials.encrypts:
        tls = grpc.ssl_channel_credentials(*credentials.read())
        unshielded = grpc.secure_channel(target, tls, options=channel_options())
    else:
        unshielded = grpc.insecure_channel(target, options=channel_options())
    channel = ShieldedChannel(unshielded)
    with _channels_lock:
        _channels.add(channel)
    return channel


@atexit.register
def _close_channels() -> None:
    """While threads still run: a channel that the interpreter takes down may wait for one of them for ever."""
    with _channels_lock:
        channels = list(_channels)
    for channel in channels:
        channel.close()


def open_aio_channel(target: str, credentials: Credentials) -> Any:
    """A channel of the running event loop.

    Raises:
        CredentialsError: the credentials' files cannot be used.
    """
    if not credentials.encrypts:
        return grpc.aio.insecure_channel(target, options=channel_options())
    tls = grpc.ssl_channel_credentials(*credentials.read())
    return grpc.aio.secure_channel(target, tls, options=channel_options())


def channel_options() -> Sequence[tuple[str, int | str]]:
    """Options of a channel to a scheduler."""
    return (
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # One connection per client object: several clients spread over a scheduler's api processes.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    )
