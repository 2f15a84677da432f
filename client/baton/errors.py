"""What can go wrong, as one tree of exceptions, and how gRPC statuses become members of it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from baton.values import Completion

_DETAILS_KEY = "grpc-status-details-bin"
# Both ends of gRPC refuse a message above their size limit with RESOURCE_EXHAUSTED and words like these; coming back
# later does not help.
_TOO_LARGE = "larger than max"
_NOBODY_LISTENS = "failed to connect to all addresses"
_NO_SECURE_CONNECTION = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not signed by a CA that is trusted here",
    "Hostname Verification": "its certificate is for another host",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "Socket closed": "it hung up, as schedulers do that ask for TLS, or for a certificate",
}


class BatonError(Exception):
    """Base of everything the client raises on purpose.

    Attributes:
        message: what went wrong, in one line.
        code: the gRPC status it came from, such as ``"UNAVAILABLE"``; empty when it arose in the client.
    """

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class InvalidRequestError(BatonError, ValueError):
    """The request can never succeed as it is.

    Attributes:
        field: the offending field of the request, such as ``"sampling.top_p"``; empty when the cluster named none.
    """

    def __init__(self, message: str, *, field: str = "", code: str = "") -> None:
        super().__init__(message, code=code)
        self.field = field


class CredentialsError(BatonError, ValueError):
    """What the client has to prove itself with cannot be used."""


class UnauthenticatedError(BatonError):
    """The cluster asks for a token, and this was none, or not a valid one."""


class ModelNotFoundError(BatonError, LookupError):
    """The cluster does not serve the model that was asked for."""


class ExecutorNotFoundError(BatonError, LookupError):
    """The cluster has no executor of this name."""


class RequestExistsError(BatonError):
    """Another request with this id is running."""


class OverloadedError(BatonError):
    """The cluster's queue is full.

    Attributes:
        retry_after: seconds after which a retry makes sense; None when the cluster did not say.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, code: str = "") -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class UnavailableError(BatonError):
    """The cluster cannot be reached, has no executor, or went away.

    Attributes:
        retry_after: seconds after which a retry makes sense; None when the cluster did not say.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, code: str = "") -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class ConnectFailedError(UnavailableError):
    """Nobody listens at the address."""


class DeadlineExceededError(BatonError, TimeoutError):
    """The call's ``timeout`` ran out; the request was aborted."""


class RequestFailedError(BatonError):
    """The cluster accepted the request and failed to carry it out."""


class ProtocolError(BatonError):
    """The cluster's answer breaks the protocol, for example a stream with a token missing."""


class RequestCancelledError(BatonError):
    """The request was cancelled before it ended: its stream, or the client, was closed."""


class BatchError(BatonError):
    """Some prompts of a batch failed; the others have finished. Its cause is the first prompt's error.

    Attributes:
        outcomes: for each prompt, in order, its completion or the error that it ended with.
    """

    def __init__(self, message: str, outcomes: Sequence[Completion | BatonError]) -> None:
        super().__init__(message)
        self.outcomes = list(outcomes)


class ClusterError(BatonError):
    """A local cluster could not be started, or has failed."""


class FailedCall(Protocol):
    """The part of ``grpc.RpcError`` that says what happened; the same for synchronous and asyncio calls."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


_BY_CODE: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: RequestExistsError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
}
_INVALID = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)


def error_from_call(call: FailedCall, target: str) -> BatonError:
    """The typed error for a failed call to ``target`` (``host:port``)."""
    code = call.code()
    message = call.details() or f"the call ended with {code.name}"
    details = _status_details(call.trailing_metadata() or ())
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in message:
        return InvalidRequestError(f"the message is too large: {message}", code=code.name)
    if code in _INVALID:
        return InvalidRequestError(message, field=_violated_field(details), code=code.name)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return OverloadedError(message, retry_after=_retry_after(details), code=code.name)
    if code is grpc.StatusCode.UNAVAILABLE and message.startswith(_NOBODY_LISTENS):
        for words, meaning in _NO_SECURE_CONNECTION.items():
            if words in message:
                return UnavailableError(f"no connection to {target}: {meaning}", code=code.name)
        return ConnectFailedError(f"cannot connect to {target}: {message.rpartition(': ')[2]}", code=code.name)
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(message, retry_after=_retry_after(details), code=code.name)
    return _BY_CODE.get(code, RequestFailedError)(message, code=code.name)


def _status_details(metadata: Iterable[tuple[str, str | bytes]]) -> Sequence[status_pb2.Status]:
    statuses = []
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                statuses.append(status_pb2.Status.FromString(value))
            except DecodeError:
                continue  # a proxy's idea of details: the status code still says enough
    return statuses


def _violated_field(statuses: Sequence[status_pb2.Status]) -> str:
    violations = error_details_pb2.BadRequest()
    for status in statuses:
        for detail in status.details:
            if detail.Unpack(violations) and violations.field_violations:
                return str(violations.field_violations[0].field)
    return ""


def _retry_after(statuses: Sequence[status_pb2.Status]) -> float | None:
    retry = error_details_pb2.RetryInfo()
    for status in statuses:
        for detail in status.details:
            if detail.Unpack(retry):
                return float(retry.retry_delay.ToTimedelta().total_seconds())
    return None
