"""Callers' messages on their way to the engine: decoded, validated, refused in so many words."""

import math
import tempfile
from pathlib import Path

from google.protobuf.message import DecodeError, Message

from baton_protos import generation_pb2 as pb
from scheduler_service.api.checkpoint import load_checkpoint
from scheduler_service.api.errors import RequestError
from scheduler_service.api.generation_wire import decode_prompt, decode_request, encode_error
from scheduler_service.api.prompts import PromptEncoder
from scheduler_service.api.validation import RequestLimits, check_prompt, encode_prompt, validate
from tests.api.conftest import write_checkpoint
from tests.api.fake_engine import VOCAB_SIZE
from tests.fuzz.mutation import Mutator, golden

_MAX_TOTAL_TOKENS = 1000
_REQUESTS = [
    pb.GenerateRequest(text="def f(x):"),
    pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), stop=pb.StopConditions(max_tokens=5)),
    pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])),
]


def text_side() -> tuple[PromptEncoder, RequestLimits]:
    """What validation needs, of a small checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = load_checkpoint(write_checkpoint(Path(directory)))
    limits = RequestLimits(
        model="tiny",
        eos_token_ids=checkpoint.eos_token_ids,
        has_tokenizer=True,
        vocab_size=VOCAB_SIZE,
        max_total_tokens=_MAX_TOTAL_TOKENS,
    )
    return PromptEncoder(checkpoint.tokenizer, checkpoint.chat_template), limits


class ApiTarget:
    """Everything is refused with a typed error, or is a request that the core may be given."""

    def __init__(self, seed: int) -> None:
        self.served = 0
        self._encoder, self._limits = text_side()
        mutator = Mutator(seed)
        requests = [*golden(pb.GenerateRequest), *(request.SerializeToString() for request in _REQUESTS)]
        self._generate = mutator.frames(pb.GenerateRequest, requests)
        self._tokenize = mutator.frames(pb.TokenizeRequest, golden(pb.TokenizeRequest))

    def throw(self) -> None:
        """A GenerateRequest and a TokenizeRequest."""
        self._offer(pb.GenerateRequest, next(self._generate))
        self._offer(pb.TokenizeRequest, next(self._tokenize))

    @property
    def frames_per_throw(self) -> int:
        """Hostile messages in one."""
        return 2

    def finish(self) -> None:
        """Nothing is left to be done."""

    def close(self) -> None:
        """Nothing is held."""

    def _offer(self, kind: type[Message], data: bytes) -> None:
        try:
            message = kind.FromString(data)
        except DecodeError:
            return  # gRPC answers that
        try:
            if isinstance(message, pb.GenerateRequest):
                self._validate(message)
            else:
                assert isinstance(message, pb.TokenizeRequest)
                encode_prompt(check_prompt(decode_prompt(message), self._limits), self._limits, self._encoder)
        except RequestError as error:
            encode_error(error)

    def _validate(self, message: pb.GenerateRequest) -> None:
        request = decode_request(message)
        validated = validate(request, self._limits, self._encoder)
        self.served += 1
        ids = validated.prompt_token_ids
        assert len(ids) > 0 and ids.min() >= 0 and ids.max() < VOCAB_SIZE
        assert 1 <= validated.max_tokens <= _MAX_TOTAL_TOKENS - len(ids)
        sampling = request.sampling
        for value in (sampling.temperature, sampling.top_p):
            assert math.isfinite(value)
