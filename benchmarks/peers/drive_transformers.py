"""transformers, by its continuous batching manager (``cb``) or as one left-padded static batch (``generate``)."""

import argparse
import os

from protocol import serve

_PAGE = 256


class _Model:
    mode: str

    def __init__(self, args: argparse.Namespace) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.version = f"transformers {transformers.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    def info(self) -> dict[str, str]:
        return {"name": f"{self.version} {self.mode}", "torch": self.torch.__version__}


class ContinuousBatching(_Model):
    """The manager's thread stays alive from run to run."""

    mode = "continuous batching"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=128)
        batching = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=args.kv_tokens // _PAGE,
            max_batch_tokens=args.max_batched_tokens,
            max_requests_per_batch=64,
            allow_block_sharing=True,
            seed=0,
        )
        self.manager = self.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self.manager.start()

    def run(self, requests: list[tuple[list[int], int]]) -> list[int]:
        ids = [self.manager.add_request(prompt, max_new_tokens=n, eos_token_id=-1) for prompt, n in requests]
        lengths: dict[str, int] = {}
        while len(lengths) < len(ids):
            result = self.manager.get_result(timeout=1)
            if result is None:
                if not self.manager.is_running():
                    raise RuntimeError("the manager has died")
            elif result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                lengths[result.request_id] = len(result.generated_tokens)
        return [lengths[one] for one in ids]


class Generate(_Model):
    """The whole batch runs to its longest output; only the tokens asked for are counted."""

    mode = "generate"

    def run(self, requests: list[tuple[list[int], int]]) -> list[int]:
        longest = max(len(prompt) for prompt, _ in requests)
        most = max(n for _, n in requests)
        tokens = self.torch.zeros(len(requests), longest, dtype=self.torch.long)
        mask = self.torch.zeros_like(tokens)
        for row, (prompt, _) in enumerate(requests):
            tokens[row, longest - len(prompt) :] = self.torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self.model.generation_config.eos_token_id = None
        output = self.model.generate(
            tokens, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
        )
        return [min(n, output.shape[1] - longest) for _, n in requests]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-tokens", type=int, required=True)
    parser.add_argument("--max-batched-tokens", type=int, required=True)
    parser.add_argument("--mode", choices=["cb", "generate"], required=True)
    args = parser.parse_args()
    serve(lambda: ContinuousBatching(args) if args.mode == "cb" else Generate(args))


if __name__ == "__main__":
    _main()
