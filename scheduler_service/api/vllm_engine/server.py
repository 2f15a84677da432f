"""The port that gateways dial: plaintext and without credentials, since they have neither. It stays in the pod."""

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from scheduler_service.api.health import HealthServicer
from scheduler_service.api.vllm_engine.servicer import SERVICE, VllmEngineServicer


def gateway_server(
    servicer: VllmEngineServicer,
    health_servicer: HealthServicer,
    address: str,
    options: Sequence[tuple[str, int]],
) -> grpc.aio.Server:
    """A server of this dialect alone, bound but not started.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    server = grpc.aio.server(options=options)
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    server.add_insecure_port(address)
    return server
