"""Messages of other dialects on their way to the engine: decoded, validated, refused in so many words."""

from collections.abc import Callable

from google.protobuf.message import DecodeError
from smg_grpc_proto.generated import vllm_engine_pb2

from baton_protos import generation_pb2, open_inference_pb2
from scheduler_service.api.errors import RequestError
from scheduler_service.api.generation_wire import encode_error
from scheduler_service.api.open_inference.wire import decode_inference
from scheduler_service.api.request import GenerationRequest
from scheduler_service.api.validation import validate
from scheduler_service.api.vllm_engine.wire import decode_request
from tests.api.dialects import as_inference, as_vllm
from tests.fuzz.api_target import text_side
from tests.fuzz.mutation import Mutator, golden

_REQUESTS = [
    generation_pb2.GenerateRequest(text="def f(x):", sampling=generation_pb2.SamplingParams(temperature=0.5, top_k=3)),
    generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]),
        stop=generation_pb2.StopConditions(max_tokens=5, stop_strings=["x"]),
        n=2,
    ),
]


class DialectsTarget:
    """Everything is refused with a typed error, or is a request that the core may be given."""

    def __init__(self, seed: int) -> None:
        self.served = 0
        self._encoder, self._limits = text_side()
        mutator = Mutator(seed)
        inferences = [as_inference(request, raw=raw) for request in _REQUESTS for raw in (False, True)]
        valid = [message.SerializeToString() for message in inferences if message is not None]
        valid += golden(open_inference_pb2.ModelInferRequest)
        self._inferences = mutator.frames(open_inference_pb2.ModelInferRequest, valid)
        generates = [as_vllm(request) for request in _REQUESTS]
        valid = [message.SerializeToString() for message in generates if message is not None]
        self._generates = mutator.frames(vllm_engine_pb2.GenerateRequest, valid)

    def throw(self) -> None:
        """A ModelInferRequest and a VllmEngine's GenerateRequest."""
        self._offer(next(self._inferences), _inference)
        self._offer(next(self._generates), _generate)

    @property
    def frames_per_throw(self) -> int:
        """Hostile messages in one."""
        return 2

    def finish(self) -> None:
        """Nothing is left to be done."""

    def close(self) -> None:
        """Nothing is held."""

    def _offer(self, data: bytes, decode: Callable[[bytes], GenerationRequest]) -> None:
        try:
            validate(decode(data), self._limits, self._encoder)
            self.served += 1
        except DecodeError:
            return  # gRPC answers that
        except RequestError as error:
            encode_error(error)


def _inference(data: bytes) -> GenerationRequest:
    return decode_inference(open_inference_pb2.ModelInferRequest.FromString(data)).request


def _generate(data: bytes) -> GenerationRequest:
    return decode_request(vllm_engine_pb2.GenerateRequest.FromString(data))
