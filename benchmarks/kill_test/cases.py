"""What is asked: every way of choosing tokens and of ending, on several prompts."""

import random
from dataclasses import dataclass
from typing import cast

from baton import GenerateOptions

_PROMPTS = (
    "def fibonacci(n):",
    "import os\n\n\ndef walk(path):",
    "class Stack:\n    def __init__(self):",
    "for i in range(10):\n    print(",
    '"""Parse a configuration file."""\n\nimport json\n',
    "def is_prime(n: int) -> bool:\n    if n < 2:",
    "try:\n    value = int(text)\nexcept",
    "with open(path) as file:\n    for line in file:",
)
_TEXT = {"ignore_eos": True}
# Ends, where it can end early, come no sooner than min_tokens: a stream must be long enough to be interrupted.
PARAMETERS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0, **_TEXT},
    "seeded": {"temperature": 1.0, **_TEXT},
    "top-k": {"temperature": 0.8, "top_k": 20, **_TEXT},
    "top-p": {"temperature": 1.2, "top_p": 0.9, **_TEXT},
    "min-p": {"temperature": 1.0, "min_p": 0.05, **_TEXT},
    "repetition penalty": {"temperature": 0.7, "repetition_penalty": 1.3, **_TEXT},
    "frequency and presence": {"temperature": 0.9, "frequency_penalty": 0.4, "presence_penalty": 0.3, **_TEXT},
    "logit bias": {"temperature": 1.0, "logit_bias": {10: 3.0, 200: -100.0, 300: 1.5}, **_TEXT},
    "banned ids": {"temperature": 1.0, "banned_token_ids": list(range(50, 90)), **_TEXT},
    "min tokens": {"temperature": 1.0, "min_tokens": 64},
    "allowed ids": {"temperature": 1.0, "allowed_token_ids": list(range(10, 400)), **_TEXT},
    "stop strings": {"temperature": 1.0, "min_tokens": 64, "stop": ["\n", "("], **_TEXT},
    "stop ids": {"temperature": 1.0, "min_tokens": 64, "stop_token_ids": list(range(200, 210)), **_TEXT},
    "stop string included": {"temperature": 1.0, "min_tokens": 64, "stop": ["self", ")"], "include_stop": True},
    "log probabilities": {"temperature": 1.0, "logprobs": 3, **_TEXT},
    "processed log probabilities": {"top_p": 0.8, "logprobs": 5, "processed_logprobs": True, **_TEXT},
    "prompt's log probabilities": {"temperature": 1.0, "prompt_logprobs": 2, "logprobs": 0, **_TEXT},
    "three samples": {"temperature": 1.0, "n": 3, **_TEXT},
    "regex": {"temperature": 1.0, "regex": "([a-z]{3,9} ){40,60}"},
    "grammar": {"temperature": 1.0, "grammar": 'start: line~30..60\nline: /[a-z]+/ " = " /[0-9]+/ ";"'},
    "everything": {
        "temperature": 1.1,
        "top_k": 200,
        "top_p": 0.95,
        "min_p": 0.001,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
        "logit_bias": {10: 2.0},
        "banned_token_ids": [11],
        "min_tokens": 64,
        "stop": ["return"],
        "logprobs": 2,
        "n": 2,
    },
    "json": {"temperature": 1.0, "json_schema": '{"type": "array", "items": {"type": "integer"}, "minItems": 30}'},
}


@dataclass(frozen=True, slots=True)
class Case:
    """One request; it can be sent any number of times."""

    name: str
    prompt: str
    options: GenerateOptions


def cases(max_tokens: int) -> list[Case]:
    """All of them: every set of parameters on every prompt, in an order that mixes them."""
    found = []
    for number, prompt in enumerate(_PROMPTS):
        for name, parameters in PARAMETERS.items():
            options = {"max_tokens": max_tokens + 4 * number, "seed": 1000 + number, **parameters}
            found.append(Case(name, prompt, cast(GenerateOptions, options)))
    return found


def random_case(rng: random.Random) -> Case:
    """A request of any kind and length."""
    name, parameters = rng.choice(list(PARAMETERS.items()))
    least = parameters.get("min_tokens", 1)
    assert isinstance(least, int)
    prompt = "".join(rng.choices(_PROMPTS, k=rng.randint(1, 20)))
    options = {"max_tokens": rng.randint(least, 160), "seed": rng.getrandbits(32), **parameters}
    return Case(name, prompt, cast(GenerateOptions, options))
