"""Baton's client: ``Client`` and ``AsyncClient`` talk to a cluster, ``LocalCluster`` runs one on this machine."""

from baton.aio import AsyncClient, AsyncStream
from baton.client import Client, Stream
from baton.cluster_options import ClusterOptions
from baton.errors import (
    BatonError,
    ClusterError,
    ConnectFailedError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RequestCancelledError,
    RequestExistsError,
    RequestFailedError,
    UnavailableError,
)
from baton.local_cluster import LocalCluster
from baton.values import (
    ChatMessage,
    ClusterStatus,
    Completion,
    Delta,
    ExecutorStatus,
    FinishReason,
    ModelInfo,
    Prompt,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BatonError",
    "ChatMessage",
    "Client",
    "ClusterError",
    "ClusterOptions",
    "ClusterStatus",
    "Completion",
    "ConnectFailedError",
    "DeadlineExceededError",
    "Delta",
    "ExecutorStatus",
    "FinishReason",
    "InvalidRequestError",
    "LocalCluster",
    "ModelInfo",
    "ModelNotFoundError",
    "OverloadedError",
    "Prompt",
    "ProtocolError",
    "RequestCancelledError",
    "RequestExistsError",
    "RequestFailedError",
    "Stream",
    "UnavailableError",
    "Usage",
]
