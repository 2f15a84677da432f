"""What gateways do beyond passing requests on: fetching the tokenizer, and watching the scheduler come and go."""

import shutil
from pathlib import Path

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc

from baton import LocalCluster
from baton.checkpoints import TINY_PYTHON
from tests.api.conftest import free_port
from tests.e2e.harness import options
from tests.foreign import ForeignScript

from .conftest import FOLDER, VENV, running_gateway


def test_a_gateway_elsewhere_fetches_the_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_PYTHON, folder)
    port = free_port()
    flags = ("--vllm-grpc-port", str(port), "--served-model-name", "far")
    with LocalCluster(options(folder, scheduler_arguments=flags)) as cluster:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            # Whoever asks next gets what was packed for this call; the gateway cannot see the folder any more.
            for _ in vllm_engine_pb2_grpc.VllmEngineStub(channel).GetTokenizer(common_pb2.GetTokenizerRequest()):
                pass
        folder.rename(tmp_path / "gone")
        with running_gateway("--worker", f"grpc://127.0.0.1:{port}") as gateway:
            assert gateway.model == "far"
            messages = [{"role": "user", "content": "größer"}]
            asked = {"model": "far", "messages": messages, "max_tokens": 10, "temperature": 0}
            with ForeignScript(VENV, FOLDER / "openai_client.py", gateway.url) as openai:
                answer = openai.call("chat", **asked)
            assert answer["choices"][0]["message"]["content"]
            assert answer["usage"]["completion_tokens"] <= 10
        assert cluster.failure is None
