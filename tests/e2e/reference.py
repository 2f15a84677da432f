"""What transformers says: greedy continuations, and how close a call each token was."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.e2e.corpus import CorpusRequest


class Reference:
    """A checkpoint as transformers runs it in float32, on one thread."""

    def __init__(self, checkpoint: Path) -> None:
        torch.set_num_threads(1)  # the machine is shared with the cluster under test
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def greedy(self, requests: Sequence[CorpusRequest], max_tokens: int) -> list[tuple[int, ...]]:
        """``generate(do_sample=False)`` for every request; prompts of equal length in one batch, so without padding."""
        batches: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            batches[len(request.prompt)].append(index)
        outputs: list[tuple[int, ...]] = [()] * len(requests)
        for length, indices in batches.items():
            prompts = torch.tensor([requests[index].prompt for index in indices])
            made = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
            for index, row in zip(indices, made[:, length:].tolist(), strict=True):
                outputs[index] = tuple(row)
        return outputs

    def gap(self, prefix: Sequence[int]) -> float:
        """The lead of the best next token over the second best, in logits."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([list(prefix)])).logits[0, -1]
        first, second = torch.topk(logits, 2).values.tolist()
        return float(first - second)
