"""Errors that a caller may see."""

import grpc

# google.rpc details and the message travel in HTTP/2 trailers, which peers cap at 8 KiB in all.
_MAX_MESSAGE_CHARS = 300

RETRY_SOON = 1.0  # seconds


class RequestError(Exception):
    """A request cannot be served, for a reason its caller can understand.

    Attributes:
        status: the gRPC status code.
        field: path of the offending field in the request message, empty when no field is to blame.
        message: what is wrong, at most 300 characters.
        retry_after: seconds after which trying again makes sense; None when it does not.
        push_back: clients shall not retry by themselves, though the status says that they may.
    """

    def __init__(
        self,
        status: grpc.StatusCode,
        field: str,
        message: str,
        *,
        retry_after: float | None = None,
        push_back: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.message = message[:_MAX_MESSAGE_CHARS]
        self.retry_after = retry_after
        self.push_back = push_back


def invalid(field: str, message: str) -> RequestError:
    """INVALID_ARGUMENT that names ``field``."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, field, message)


def unavailable(message: str) -> RequestError:
    """UNAVAILABLE with a hint to come back soon."""
    return RequestError(grpc.StatusCode.UNAVAILABLE, "", message, retry_after=RETRY_SOON)


def waited_in_vain(message: str) -> RequestError:
    """UNAVAILABLE after all the time that the request would wait; automatic retries would multiply it."""
    return RequestError(grpc.StatusCode.UNAVAILABLE, "", message, retry_after=RETRY_SOON, push_back=True)


def overloaded(message: str) -> RequestError:
    """RESOURCE_EXHAUSTED with a hint to come back soon."""
    return RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "", message, retry_after=RETRY_SOON)
