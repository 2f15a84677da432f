"""OpenVINO GenAI's continuous batching pipeline in bfloat16.

It needs its own model format, made with optimum-intel:
``optimum-cli export openvino -m CHECKPOINT --task text-generation-with-past --weight-format fp16 DIRECTORY``
"""

import argparse
from typing import Any

from protocol import serve


class OpenVino:
    def __init__(self, args: argparse.Namespace) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.max_num_seqs = 64
        scheduling.max_num_batched_tokens = args.max_batched_tokens
        scheduling.cache_size = args.kv_gib
        scheduling.enable_prefix_caching = True
        scheduling.dynamic_split_fuse = True
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            "INFERENCE_NUM_THREADS": args.threads,
            "NUM_STREAMS": 1,
        }
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(args.model, scheduling, "CPU", properties)

    def info(self) -> dict[str, str]:
        return {"name": f"openvino-genai {self.genai.__version__}", "openvino": self.openvino.__version__}

    def run(self, requests: list[tuple[list[int], int]]) -> list[int]:
        prompts = [self.openvino.Tensor(self.numpy.array([prompt], dtype=self.numpy.int64)) for prompt, _ in requests]
        outputs = self.pipeline.generate(prompts, [self._config(n) for _, n in requests])
        return [len(output.m_generation_ids[0]) for output in outputs]

    def _config(self, max_new_tokens: int) -> Any:
        config = self.genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        return config


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-gib", type=int, required=True)
    parser.add_argument("--max-batched-tokens", type=int, required=True)
    args = parser.parse_args()
    serve(lambda: OpenVino(args))


if __name__ == "__main__":
    _main()
