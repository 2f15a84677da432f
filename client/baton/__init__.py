"""Baton's client.

``Client`` and ``AsyncClient`` talk to a cluster, ``LocalCluster`` runs one on this machine, ``LLM`` runs batches on one
of its own.
"""

from baton.aio import AsyncClient, AsyncStream
from baton.client import Client, PendingCompletion, Stream
from baton.cluster_options import ClusterOptions
from baton.credentials import Credentials
from baton.errors import (
    BatchError,
    BatonError,
    ClusterError,
    ConnectFailedError,
    CredentialsError,
    DeadlineExceededError,
    ExecutorNotFoundError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RequestCancelledError,
    RequestExistsError,
    RequestFailedError,
    UnauthenticatedError,
    UnavailableError,
)
from baton.llm import LLM
from baton.local_cluster import LocalCluster
from baton.options import GenerateOptions
from baton.sampling import SamplingParams
from baton.stream_log import ResumePolicy
from baton.values import (
    ChatMessage,
    ClusterStatus,
    Completion,
    Delta,
    ExecutorState,
    ExecutorStatus,
    FinishReason,
    ModelInfo,
    Prompt,
    Sample,
    Timings,
    TokenLogprobs,
    TopToken,
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
    "Credentials",
    "CredentialsError",
    "DeadlineExceededError",
    "Delta",
    "ExecutorNotFoundError",
    "ExecutorState",
    "ExecutorStatus",
    "FinishReason",
    "GenerateOptions",
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
    "ResumePolicy",
    "Sample",
    "SamplingParams",
    "Stream",
    "Timings",
    "TokenLogprobs",
    "TopToken",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
]
