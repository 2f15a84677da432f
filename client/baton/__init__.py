"""Baton's client.

``Client`` and ``AsyncClient`` talk to a cluster, ``LocalCluster`` runs one on this machine, ``LLM`` runs batches on one
of its own.
"""

from baton.aio import AsyncClient, AsyncStream
from baton.client import Client, PendingCompletion, Stream
from baton.cluster_options import ClusterOptions
from baton.errors import (
    BatchError,
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
from baton.llm import LLM
from baton.local_cluster import LocalCluster
from baton.sampling import SamplingParams
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
    "LLM",
    "AsyncClient",
    "AsyncStream",
    "BatchError",
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
    "PendingCompletion",
    "Prompt",
    "ProtocolError",
    "RequestCancelledError",
    "RequestExistsError",
    "RequestFailedError",
    "SamplingParams",
    "Stream",
    "UnavailableError",
    "Usage",
]
