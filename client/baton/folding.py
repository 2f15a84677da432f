"""Folds the messages of one stream into deltas and, at its end, a completion."""

from baton import messages
from baton.errors import ProtocolError
from baton.values import Completion, Delta
from baton_protos import generation_pb2 as pb


class StreamFolder:
    """Checks and accumulates one stream.

    Tokens and text carry absolute positions: what came before is dropped, a hole is an error. So a stream that was
    taken up again elsewhere cannot repeat or lose anything unnoticed.
    """

    def __init__(self) -> None:
        self._start: pb.StreamStart | None = None
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._text_length = 0
        self._completion: Completion | None = None

    @property
    def request_id(self) -> str:
        """The request's id; empty until the stream's first message was added."""
        return self._start.request_id if self._start is not None else ""

    @property
    def completion(self) -> Completion | None:
        """The finished request; None until the stream's last message was added."""
        return self._completion

    def add(self, response: pb.GenerateStreamResponse) -> Delta | None:
        """Adds the next message and returns what is new in it, if anything.

        Raises:
            ProtocolError: the message does not continue the stream.
        """
        if self._completion is not None:
            raise ProtocolError("the stream went on after its last message")
        event = response.WhichOneof("event")
        if event == "start" and self._start is None:
            self._start = response.start
            return None
        if self._start is None:
            raise ProtocolError(f"the stream began with {event or 'an empty message'}")
        if event == "chunk":
            return self._add_chunk(response.chunk)
        if event == "end":
            self._completion = self._finish(self._start, response.end)
            return None
        raise ProtocolError(f"unexpected {event or 'empty message'} in the stream")

    def finished(self) -> Completion:
        """The completion, once the transport says that the stream is over.

        Raises:
            ProtocolError: it ended without its last message.
        """
        if self._completion is None:
            raise ProtocolError("the stream ended without its last message")
        return self._completion

    def _add_chunk(self, chunk: pb.StreamChunk) -> Delta | None:
        if chunk.sample:
            raise ProtocolError(f"one sample was asked for, sample {chunk.sample} came")
        index, offset = len(self._token_ids), self._text_length
        token_ids = chunk.token_ids[_known("token", len(chunk.token_ids), chunk.token_index, index) :]
        text = chunk.text[_known("text", len(chunk.text), chunk.text_offset, offset) :]
        if not token_ids and not text:
            return None
        self._token_ids.extend(token_ids)
        self._text.append(text)
        self._text_length += len(text)
        return Delta(text=text, token_ids=tuple(token_ids), token_index=index, text_offset=offset)

    def _finish(self, start: pb.StreamStart, end: pb.StreamEnd) -> Completion:
        if end.usage.completion_tokens != len(self._token_ids):
            raise ProtocolError(f"{end.usage.completion_tokens} tokens were sent, {len(self._token_ids)} came")
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=messages.finish_reason(end.finish_reason),
            usage=messages.usage(end.usage),
            prompt_token_ids=tuple(start.prompt_token_ids),
            seed=start.seed,
            request_id=start.request_id,
            model_fingerprint=start.model_fingerprint,
        )


def _known(what: str, length: int, position: int, have: int) -> int:
    """How many of ``length`` items that start at ``position`` are among the ``have`` items known already."""
    if length and position > have:
        raise ProtocolError(f"{what} gap in the stream: expected index {have}, got {position}")
    return max(have - position, 0)
