"""What a request is known by."""

from typing import NamedTuple

# Neither names of tenants nor of requests can have it in them: they are printable.
_SEPARATOR = "\0"


class RequestKey(NamedTuple):
    """What a request is known by: names are each tenant's own."""

    tenant: str
    request_id: str

    def text(self) -> str:
        """The key as one text, for other api processes."""
        return f"{self.tenant}{_SEPARATOR}{self.request_id}"

    @classmethod
    def from_text(cls, text: str) -> "RequestKey":
        """The key that ``text`` gave."""
        tenant, _, request_id = text.partition(_SEPARATOR)
        return cls(tenant, request_id)
